"""The directory of a ranker as one of sentence-transformers too, described without it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from torch import Tensor

from distill.ranking.colbert import ColBERT
from distill.ranking.cross import Classifier, CrossEncoder
from distill.ranking.dual import DualEncoder
from distill.ranking.encoding import first
from distill.ranking.kinds import ENCODER
from distill.ranking.ranker import Ranker
from growth import files
from growth.shards import SINGLE, write_file

BASE = "sentence_transformers.base.modules"
TRANSFORMER, DENSE, NORMALIZE = f"{BASE}.transformer.Transformer", f"{BASE}.dense.Dense", f"{BASE}.normalize.Normalize"
POOLING = "sentence_transformers.sentence_transformer.modules.pooling.Pooling"
MASK = "sentence_transformers.multi_vector_encoder.modules.multi_vector_mask.MultiVectorMask"
IDENTITY = "torch.nn.modules.linear.Identity"
READS = {  # how the encoder is run: what AutoModel gives, without a head
    "transformer_task": "feature-extraction",
    "modality_config": {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
    "module_output_name": "token_embeddings",
}
CLASSIFIES = {
    "transformer_task": "sequence-classification",
    "modality_config": {"text": {"method": "forward", "method_output_name": "logits"}},
    "module_output_name": "scores",
}
Part = tuple[str, dict[str, Any], Mapping[str, Tensor]]  # class, config.json, weights


def describe(ranker: Ranker, directory: Path) -> None:
    """Make the directory of a ranker one of sentence-transformers (6.2) as well, where that has a class for it.

    `modules.json` points at `encoder/`, so no weight but those of the head stands twice.
    """
    if refusal(ranker):
        return
    model_type, reads, parts = _described(ranker)
    written = [_written(directory, number, *part) for number, part in enumerate(parts, 1)]
    transformer = {"idx": 0, "name": "0", "path": ENCODER, "type": TRANSFORMER}
    files.write_json(directory / "modules.json", [transformer, *written])
    files.write_json(directory / ENCODER / "sentence_bert_config.json", reads | {"max_seq_length": ranker.kind.longest})
    files.write_json(directory / "config_sentence_transformers.json", _about(ranker, model_type))


def refusal(ranker: Ranker) -> str | None:
    """Why sentence-transformers cannot load it."""
    if isinstance(ranker, ColBERT) and ranker.kind.masks:
        return "sentence-transformers puts [MASK] behind a query's last token, here they stand before it"
    known = isinstance(ranker, CrossEncoder | Classifier | DualEncoder | ColBERT)
    return None if known else f"sentence-transformers has no place for a {type(ranker).__name__}"


def _described(ranker: Ranker) -> tuple[str, dict[str, Any], list[Part]]:
    """The class that loads it, how its encoder is run and reads, and the modules behind it."""
    kind, head = ranker.kind, ranker.head()
    each = READS | {"query_length": kind.query_length, "document_length": kind.passage_length}
    match ranker:
        case Classifier():
            return "CrossEncoder", CLASSIFIES, []
        case CrossEncoder():
            pooling = "cls" if ranker.pick is first else "lasttoken"
            return "CrossEncoder", READS, [_pooling(ranker, pooling), _dense(head, "sentence_embedding", "scores")]
        case DualEncoder():
            pooling = "lasttoken" if kind.pooling == "last" else kind.pooling
            return "SentenceTransformer", each, [_pooling(ranker, pooling), *_vectors(ranker, "sentence_embedding")]
    mask = MASK, {"skiplist_words": [], "skiplist_tasks": ["document"], "keep_only_token_ids": None}, {}
    return "MultiVectorEncoder", each, [*_vectors(ranker, "token_embeddings"), mask]


def _vectors(ranker: DualEncoder | ColBERT, of: str) -> list[Part]:
    normal = [(NORMALIZE, {"module_input_name": of, "module_output_name": of}, {})]
    head = ranker.head()
    return ([_dense(head, of, of)] if head else []) + (normal if ranker.kind.similarity == "cosine" else [])


def _pooling(ranker: Ranker, mode: str) -> Part:
    return POOLING, {"embedding_dimension": ranker.width, "pooling_mode": mode, "include_prompt": True}, {}


def _dense(head: Mapping[str, Tensor], of: str, to: str) -> Part:
    wide, width = head["linear.weight"].shape
    config = {"in_features": width, "out_features": wide, "bias": "linear.bias" in head}
    names = {"activation_function": IDENTITY, "module_input_name": of, "module_output_name": to}
    return DENSE, config | names, head


def _written(directory: Path, number: int, kind: str, config: dict[str, Any], weights: Mapping[str, Tensor]) -> dict:
    """The directory of a module, and its line in modules.json."""
    path = directory / f"{number}_{kind.rpartition('.')[2]}"
    path.mkdir()
    files.write_json(path / "config.json", config)
    if weights:
        write_file(path / SINGLE, list(weights.items()))
    return {"idx": number, "name": str(number), "path": path.name, "type": kind}


def _about(ranker: Ranker, model_type: str) -> dict[str, Any]:
    versions = {"transformers": transformers.__version__}
    prompts = {} if model_type == "CrossEncoder" else {"document": "", "query": ""}
    about = {"__version__": versions, "default_prompt_name": None, "model_type": model_type, "prompts": prompts}
    if model_type == "CrossEncoder":
        return about | {"activation_fn": IDENTITY}  # a score, not a probability
    return about | {"similarity_fn_name": ranker.kind.similarity if model_type == "SentenceTransformer" else "maxsim"}
