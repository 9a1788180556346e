"""A transformers model from a checkpoint directory that is not trusted.

The only file that loads one. `growth` validates the directory first (no pickle, no path that leaves it, headers that
tell the truth); then it is compared with what its config asks for, since transformers alone fills in a missing tensor
at random and takes NaN or integers as they come.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from distill.layout import MAY_DECODE
from growth import checkpoint as reading
from growth import files
from growth.console import say
from growth.errors import UserError
from growth.ranges import torch_dtype

HEADS = {"mlm": transformers.MODEL_FOR_MASKED_LM_MAPPING, "causal": transformers.MODEL_FOR_CAUSAL_LM_MAPPING}
CLASSIFIERS = transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
WORDS = {"mlm": "masked-language-model", "causal": "causal-language-model", "classify": "classification"}
ENCODERS = {"t5": "T5EncoderModel"}  # of encoder-decoder families the encoder is what we take
UNFIT = (ValueError, TypeError, RuntimeError, ArithmeticError, LookupError, AttributeError)  # raised over bad configs
REAL = ("F64", "F32", "F16", "BF16")
BUFFERS = re.compile(r"(position_ids|token_type_ids|inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")


def load(
    path: Path,
    head: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    *,
    seed: int = 0,
    first: dict[str, Any] | None = None,
) -> nn.Module:
    """The model of a checkpoint directory, in eval mode; `head` is None (the base model), "mlm", "causal", "classify".

    A language-model head that the checkpoint lacks is made new from `seed`, and said so; anything else that is missing,
    of another shape than the config asks for, not finite or unknown is an error. `dtype`: None for the checkpoint's
    own, in which weights are mapped from its file, not copied. `first`: config.json of its first layers, if no others
    are to be read.
    """
    checkpoint, whole = reading.open(path), configuration(path)
    config = configuration(first, path) if first else whole
    if head is None and (own := own_head(config)):
        return load(path, own, dtype, first=first).base_model
    build = class_of(config, head)
    options = _options(build, checkpoint)
    expected = skeleton(build, config, options)
    behind = _names(skeleton(build, whole, options)) - _names(expected) if first else set()
    _compare(path, checkpoint, expected)
    checkpoint.check_values(name for name in checkpoint if inside(name, expected) not in behind)
    dtype = dtype or torch_dtype(Counter(entry.dtype for entry in checkpoint.values()).most_common(1)[0][0])
    with quiet(), seeded(seed):
        model, report = build.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    _judge(path, checkpoint, model, report, known=_other_heads(config, model) | behind)
    return model.eval()


def examine(path: Path) -> None:
    """Refuse, before a weight is read, all that headers and config.json can tell."""
    checkpoint, config = reading.open(path), configuration(path)
    _compare(path, checkpoint, skeleton(architecture(config) or class_of(config, None), config, {}))


def configuration(source: Path | dict, where: Path | str = "the config"):
    """Of a checkpoint directory, or of the content of a config.json; `auto_map` names code that comes with it."""
    if not isinstance(source, dict):
        return configuration(files.read_json(Path(source) / "config.json"), source)
    if "auto_map" in source:
        raise UserError(
            f"{where}: config.json brings its own code (auto_map), which is never run; use a plain checkpoint"
        )
    family = source.get("model_type")
    if (
        not isinstance(family, str)
        or family not in transformers.CONFIG_MAPPING
        or transformers.CONFIG_MAPPING[family] not in transformers.MODEL_MAPPING
    ):
        raise UserError(f"{where}: transformers knows no model_type {family!r}")
    named = source.get("architectures")
    if named is not None and not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
        raise UserError(f"{where}: architectures is {named!r}; a list of class names is expected")
    try:
        return transformers.CONFIG_MAPPING[family].from_dict(source)
    except (*UNFIT, StrictDataclassError) as error:
        raise UserError(f"{where}: not a {family} config: {reason(error)}") from error


@functools.cache
def headed(kind: type) -> dict[str, type]:
    """The classes with a language-model head, by kind of config: one a family (BERT's decoder is not what BERT is)."""
    found = {head: known[kind] for head, known in HEADS.items() if kind in known}
    return {"mlm": found["mlm"]} if "mlm" in found else found


def heads(kind: type) -> dict[str, type]:
    """Those, and the one that classifies."""
    found = CLASSIFIERS[kind] if kind in CLASSIFIERS and kind.model_type not in ENCODERS else None
    return headed(kind) | ({"classify": found} if found else {})


def causal(config) -> bool:
    """Whether every token sees only those before it."""
    if config.model_type in MAY_DECODE:
        return config.is_decoder
    if config.model_type == "gemma3_text" and config.use_bidirectional_attention:  # EmbeddingGemma
        return False
    return "causal" in headed(type(config))


def class_of(config, head: str | None) -> type:
    if head is None:
        encoder = ENCODERS.get(config.model_type)
        return getattr(transformers, encoder) if encoder else transformers.MODEL_MAPPING[type(config)]
    if head not in heads(type(config)):
        raise UserError(f"{config.model_type} has no {WORDS[head]} head")
    return heads(type(config))[head]


def _options(build: type, checkpoint) -> dict:
    """A base model has a pooler where its checkpoint has one."""
    if "add_pooling_layer" not in inspect.signature(build.__init__).parameters:
        return {}
    return {"add_pooling_layer": any("pooler." in name for name in checkpoint)}


def skeleton(build: type, config, options: dict) -> nn.Module:
    """The model without storage."""
    try:
        with quiet(), torch.device("meta"):
            return build(copy.deepcopy(config), **options)  # T5's encoder rewrites its config
    except UNFIT as error:
        raise UserError(f"no {build.__name__} can be built from its config: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What transformers says of a config that it cannot use."""
    said = f"nothing is known as {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(said.split())[:300]


def _compare(path: Path, checkpoint, expected: nn.Module) -> None:
    """Before any weight is read: every tensor the model has a place for has its shape and is made of real numbers."""
    places = {inside(n, expected): t for n, t in expected.state_dict().items()}
    wrong = [
        f"{name} is {entry.dtype} {list(entry.shape)}, config.json asks for float {list(place.shape)}"
        for name, entry in checkpoint.items()
        if (place := places.get(inside(name, expected))) is not None
        and (list(entry.shape) != list(place.shape) or (place.is_floating_point() and entry.dtype not in REAL))
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise UserError(f"{path}: " + "; ".join(wrong[:5]) + more)


def inside(name: str, model: nn.Module) -> str:
    """A tensor's name within the base model, whether it was saved with a head or without."""
    return name.removeprefix(model.base_model_prefix + ".")


def _judge(path: Path, checkpoint, model: nn.Module, report: dict, known: set[str]) -> None:
    """transformers has filled in what was missing and dropped what it did not know: say so, or refuse."""
    missing = sorted(report["missing_keys"])
    strange = sorted(n for n in report["unexpected_keys"] if not BUFFERS.search(n) and inside(n, model) not in known)
    strange += [name for name, *_ in report["mismatched_keys"]]
    if missing and not _whole_head(missing, checkpoint, model):
        raise UserError(f"{path} lacks {_listed(missing)}")
    if strange:
        raise UserError(f"{path} has what its config.json has no place for: {_listed(strange)}")
    if missing:
        say(f"{path} has no language-model head; these start at random: {_listed(missing)}")


def _whole_head(missing: list[str], checkpoint, model: nn.Module) -> bool:
    """Whether a head is missing, all of it and nothing else."""
    if model.base_model is model or any(inside(n, model) != n for n in missing):
        return False
    places = model.state_dict()
    return not any(n in places and inside(n, model) == n for n in checkpoint)


def _names(model: nn.Module) -> set[str]:
    return {inside(name, model) for name in model.state_dict()}


def _listed(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _other_heads(config, model: nn.Module) -> set[str]:
    """What the class that config.json names has: another head than the one asked for is no mistake."""
    build = architecture(config)
    return _names(skeleton(build, config, {})) if build else set()


def architecture(config) -> type | None:
    """The class that config.json names, if it is a model of this family."""
    build = getattr(transformers, config.architectures[0], None) if config.architectures else None
    known = isinstance(build, type) and issubclass(build, transformers.PreTrainedModel)
    return build if known and build.config_class is type(config) else None


def own_head(config) -> str | None:
    """The head of the class that config.json names."""
    return next((head for head, build in heads(type(config)).items() if build is architecture(config)), None)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' reports and bars are for people who load by hand."""
    verbosity, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
