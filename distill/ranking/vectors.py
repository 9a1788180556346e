"""Where TK's words come from: the embeddings of a checkpoint, with its tokenizer, or a file of word vectors (GloVe)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn

from distill import loading, models
from distill.ranking.texts import numbered
from growth import files
from growth.errors import UserError

SPECIAL = ("[PAD]", "[UNK]")  # the first rows of a table of word vectors
POSITIONS = 512  # computed, not learnt: a longer passage needs no other weights


def tk_encoder(
    source: str | Path,
    directory: str | Path,
    *,
    layers: int = 2,
    heads: int = 10,
    ffn: int = 300,
    positions: int = POSITIONS,
    seed: int = 0,
) -> Path:
    """An encoder for TK as a plain transformers directory: new layers on the words of `source`.

    `source` is a checkpoint directory or a text file of lines `word v1 v2 ...`. Defaults are those of the paper
    (Hofstaetter et al. 2020, arXiv 2002.01854).
    """
    source = Path(source)
    if source.is_dir():
        return models.save(_layers(_table(source), layers, heads, ffn, positions, seed), Path(directory), carry=source)
    words, vectors = glove(source)
    table = torch.cat([torch.zeros(1, vectors.shape[1]), vectors.mean(0, keepdim=True), vectors])  # padding, unknown
    model = _layers(table, layers, heads, ffn, positions, seed)
    with files.committed(Path(directory)) as temporary:
        model.save_pretrained(temporary)
        _tokenizer(words, positions).save_pretrained(temporary)
    return Path(directory)


def glove(path: str | Path) -> tuple[list[str], Tensor]:
    """The words of a file of lines `word v1 v2 ...` and their vectors [V, D], float32."""
    words: dict[str, int] = {}
    rows: list[np.ndarray] = []
    for where, line in numbered(Path(path)):
        width = len(rows[0]) if rows else len(line.split(" ")) - 1
        word, *values = line.rsplit(" ", width)  # GloVe has words with spaces
        if width < 2 or len(values) != width or word in words:
            twice = f", and {word!r} stood before" if word in words else ""
            raise UserError(f"{where}: expected a word and {max(width, 2)} numbers{twice}; found {line[:60]!r}")
        words[word] = len(rows)
        rows.append(_numbers(values, where))
    if not rows:
        raise UserError(f"{path} has no word vectors; expected lines of a word and its numbers")
    return list(words), torch.from_numpy(np.stack(rows))


def _numbers(values: list[str], where: str) -> np.ndarray:
    try:
        found = np.array(values, dtype=np.float32)
    except ValueError as error:
        raise UserError(f"{where}: {error}; expected a word and {len(values)} numbers") from None
    if not np.isfinite(found).all():
        raise UserError(f"{where}: NaN or infinity among the {len(values)} numbers of a word")
    return found


def _table(source: Path) -> Tensor:
    return loading.load(source).get_input_embeddings().weight.detach()


def _layers(table: Tensor, layers: int, heads: int, ffn: int, positions: int, seed: int) -> nn.Module:
    """New transformer layers with sinusoids for positions, on a table of words [V, D]."""
    words, width = table.shape
    if width % heads:
        fits = ", ".join(str(n) for n in range(min(16, width), 1, -1) if width % n == 0)
        raise UserError(f"heads={heads} does not divide the width of the words, {width}; {fits} do")
    config = transformers.DistilBertConfig(
        vocab_size=words, dim=width, n_layers=layers, n_heads=heads, hidden_dim=ffn,
        max_position_embeddings=positions, sinusoidal_pos_embds=True, pad_token_id=0,
    )  # fmt: skip
    model = models.fresh(config, None, seed)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(table)
    return model


def _tokenizer(words: list[str], positions: int) -> transformers.PreTrainedTokenizerFast:
    """Words and punctuation, lower case where no word of the list has any other."""
    known = [*SPECIAL, *(word for word in words if word not in SPECIAL)]
    raw = Tokenizer(WordLevel({word: i for i, word in enumerate(known)}, unk_token=SPECIAL[1]))
    if all(word == word.lower() for word in words):
        raw.normalizer = normalizers.Lowercase()
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token=SPECIAL[0], unk_token=SPECIAL[1], model_max_length=positions
    )
