"""Models: found, checked, loaded, started.

The only file that loads a transformers model. A checkpoint is validated by `growth` first (no pickle, no path that
leaves the directory, headers that tell the truth) and compared with what its config asks for; transformers alone would
fill in a missing tensor at random and take NaN or integers as they come.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers.initialization import no_init_weights

import growth
from distill import taps
from distill.sources import resolve, weights_sha256
from growth import checkpoint as reading
from growth import files
from growth.console import say
from growth.errors import UserError
from growth.writer import CARRIED

__all__ = ["Facts", "export", "facts", "freeze", "fresh", "load", "resolve", "seed_checkpoint", "weights_sha256"]
HEADS = {"mlm": transformers.MODEL_FOR_MASKED_LM_MAPPING, "causal": transformers.MODEL_FOR_CAUSAL_LM_MAPPING}
WORDS = {"mlm": "masked-language-model", "causal": "causal-language-model"}
ENCODERS = {"t5": "T5EncoderModel"}  # of encoder-decoder families the encoder is what we take
REAL = ("F64", "F32", "F16", "BF16")
BUFFERS = re.compile(r"(position_ids|token_type_ids|inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)$")


# Loading


def load(path: Path, head: str | None = None, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> nn.Module:
    """The model of a checkpoint directory, in eval mode; `head` is None (the base model), "mlm" or "causal".

    A head that the checkpoint lacks is made new from `seed`, and said so; anything else that is missing, of another
    shape than the config asks for, not finite or unknown is an error.
    """
    checkpoint, config = reading.open(path), _config(path)
    if head is None and (own := _own_head(config)):
        return load(path, own, dtype).base_model
    build = _class(config, head)
    options = _options(build, checkpoint)
    expected = _skeleton(build, config, options)
    _compare(path, checkpoint, expected)
    checkpoint.check_values()
    with _quiet(), _seeded(seed):
        model, report = build.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=False, use_safetensors=True, local_files_only=True,
            output_loading_info=True, ignore_mismatched_sizes=True, **options,
        )  # fmt: skip
    _judge(path, checkpoint, model, report, known=_other_heads(config, model))
    return model.eval()


def freeze(model: nn.Module) -> nn.Module:
    """A teacher: in eval mode, without gradients."""
    return model.eval().requires_grad_(False)


def _config(path: Path):
    return _described(files.read_json(Path(path) / "config.json"), path)


def _described(described: dict, where):
    """A configuration; `auto_map` would name code that comes with the checkpoint."""
    if "auto_map" in described:
        raise UserError(
            f"{where}: config.json brings its own code (auto_map), which is never run; use a plain checkpoint"
        )
    family = described.get("model_type")
    if family not in transformers.CONFIG_MAPPING:
        raise UserError(f"{where}: transformers knows no model_type {family!r}")
    try:
        return transformers.CONFIG_MAPPING[family].from_dict(described)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{where}: not a {family} config: {' '.join(str(error).split())[:300]}") from error


def _headed(config) -> dict[str, type]:
    """The classes with a language-model head: one kind a family (BERT's decoder is not what BERT is)."""
    found = {head: known[type(config)] for head, known in HEADS.items() if type(config) in known}
    return {"mlm": found["mlm"]} if "mlm" in found else found


def _class(config, head: str | None) -> type:
    if head is None:
        encoder = ENCODERS.get(config.model_type)
        return getattr(transformers, encoder) if encoder else transformers.MODEL_MAPPING[type(config)]
    if head not in _headed(config):
        raise UserError(f"{config.model_type} has no {WORDS[head]} head")
    return _headed(config)[head]


def _options(build: type, checkpoint) -> dict:
    """A base model has a pooler where its checkpoint has one."""
    if "add_pooling_layer" not in inspect.signature(build.__init__).parameters:
        return {}
    return {"add_pooling_layer": any("pooler." in name for name in checkpoint)}


def _skeleton(build: type, config, options: dict) -> nn.Module:
    """The model without storage."""
    with _quiet(), torch.device("meta"):
        return build(copy.deepcopy(config), **options)  # T5's encoder rewrites its config


def _compare(path: Path, checkpoint, expected: nn.Module) -> None:
    """Before any weight is read: every tensor the model has a place for has its shape and is made of real numbers."""
    places = {_inside(n, expected): t for n, t in expected.state_dict().items()}
    wrong = [
        f"{name} is {entry.dtype} {list(entry.shape)}, config.json asks for float {list(place.shape)}"
        for name, entry in checkpoint.items()
        if (place := places.get(_inside(name, expected))) is not None
        and (list(entry.shape) != list(place.shape) or (place.is_floating_point() and entry.dtype not in REAL))
    ]
    if wrong:
        more = f" (and {len(wrong) - 5} more)" if len(wrong) > 5 else ""
        raise UserError(f"{path}: " + "; ".join(wrong[:5]) + more)


def _inside(name: str, model: nn.Module) -> str:
    """A tensor's name within the base model, whether it was saved with a head or without."""
    return name.removeprefix(model.base_model_prefix + ".")


def _judge(path: Path, checkpoint, model: nn.Module, report: dict, known: set[str]) -> None:
    """transformers has filled in what was missing and dropped what it did not know: say so, or refuse."""
    missing = sorted(report["missing_keys"])
    strange = sorted(n for n in report["unexpected_keys"] if not BUFFERS.search(n) and _inside(n, model) not in known)
    strange += [name for name, *_ in report["mismatched_keys"]]
    if missing and not _whole_head(missing, checkpoint, model):
        raise UserError(f"{path} lacks {_names(missing)}")
    if strange:
        raise UserError(f"{path} has what its config.json has no place for: {_names(strange)}")
    if missing:
        say(f"{path} has no language-model head; these start at random: {_names(missing)}")


def _whole_head(missing: list[str], checkpoint, model: nn.Module) -> bool:
    """Whether a head is missing, all of it and nothing else."""
    if model.base_model is model or any(_inside(n, model) != n for n in missing):
        return False
    places = model.state_dict()
    return not any(n in places and _inside(n, model) == n for n in checkpoint)


def _names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _other_heads(config, model: nn.Module) -> set[str]:
    """What the class that config.json names has: another head than the one asked for is no mistake."""
    build = _architecture(config)
    return {_inside(n, model) for n in _skeleton(build, config, {}).state_dict()} if build else set()


def _architecture(config) -> type | None:
    return getattr(transformers, config.architectures[0], None) if config.architectures else None


@contextmanager
def _quiet() -> Iterator[None]:
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
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


# Facts


@dataclass(frozen=True)
class Facts:
    """What objectives must know of a model before any weight is loaded; widths are those of the tapped tensors."""

    family: str
    layers: int
    heads: int
    kv_heads: int
    widths: dict[str, int]  # query, key, value: heads x head size, which need not be the hidden size
    vocab: int
    causal: bool
    parameters: int  # of the class that config.json names; tied ones count once


def facts(source) -> Facts:
    """Facts of a checkpoint directory or a config, measured with the taps on a model without storage."""
    config = _config(source) if isinstance(source, str | Path) else source
    base = _skeleton(_class(config, None), config, {})
    whole = _architecture(config)
    with torch.no_grad(), taps.tap(base, [(role, -1) for role in taps.ROLES]) as seen:
        ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
        base(ids, attention_mask=torch.zeros(1, 1, 2, 2, device="meta"))  # a 4-D mask is taken as it is, not read
    shapes = {role: tuple(value.shape) for (role, _), value in seen.items()}
    return Facts(
        family=config.model_type,
        layers=config.num_hidden_layers,
        heads=shapes["query"][1],
        kv_heads=shapes["key"][1],
        widths={role: s[1] * s[3] if role in taps.IN_ATTENTION else s[2] for role, s in shapes.items()},
        vocab=config.vocab_size,
        causal="causal" in _headed(config),
        parameters=sum(p.numel() for p in (_skeleton(whole, config, {}) if whole else base).parameters()),
    )


# Starting


def seed_checkpoint(student, resolve_ref: Callable[[str], Path], dst: Path, head: str | None, seed: int) -> Path:
    """The student before its first step, as safetensors: the same for every ZeRO stage and number of ranks."""
    if student.new is not None:
        return _start_new(student.new, resolve_ref, dst, head, seed)
    if student.cut is None:
        return _continue(resolve_ref(student.from_), dst, head, seed)
    scratch = Path(dst).with_name(f"{Path(dst).name}.cut")
    try:
        cut = growth.cut(resolve_ref(student.cut.from_), scratch, layers=student.cut.layers, overwrite=True)
        return _continue(cut, dst, head, seed)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def export(start: Path, trained: Mapping[str, torch.Tensor], dst: Path) -> Path:
    """What was trained, by parameter name; everything else as it was at the start, the tokenizer too."""
    model = load(start, _own_head(_config(start)))
    places = {_inside(n, model): p for n, p in model.named_parameters()}
    with torch.no_grad():
        for name, tensor in trained.items():
            places[_inside(name, model)].copy_(tensor)
    return _save(model, dst, carry=start, overwrite=True)


def _continue(source: Path, dst: Path, head: str | None, seed: int) -> Path:
    """With the head asked for, else with the one the checkpoint has: not to train it is no reason to lose it."""
    return _save(load(source, head or _own_head(_config(source)), seed=seed), dst, carry=source)


def _own_head(config) -> str | None:
    return next((head for head, build in _headed(config).items() if build is _architecture(config)), None)


def fresh(config, head: str | None, seed: int) -> nn.Module:
    """A model of random weights, each module's drawn from (seed, its name): no order, depth or head changes a layer."""
    with _quiet(), no_init_weights():
        model = _class(config, head)(config)
    names = {module: _inside(name, model) for name, module in model.named_modules()}
    parts = [m for m in names if isinstance(m, transformers.PreTrainedModel)]
    for part in parts:
        part._init_weights = _by_name(part._init_weights, names, seed)
    with _seeded(seed):
        model.initialize_weights()
    for part in parts:
        del part._init_weights
    model.tie_weights()
    return model.eval()


def _by_name(initialise: Callable, names: dict[nn.Module, str], seed: int) -> Callable:
    def seeded(module: nn.Module) -> None:
        digest = hashlib.sha256(f"{seed}:{names[module]}".encode()).digest()
        torch.default_generator.manual_seed(int.from_bytes(digest[:7], "little"))
        initialise(module)

    return seeded


def _start_new(new, resolve_ref: Callable[[str], Path], dst: Path, head: str | None, seed: int) -> Path:
    if new.like is not None:
        source = resolve_ref(new.like)
        return _save(fresh(_config(source), head, seed), dst, carry=source)
    if isinstance(new.config, dict):
        return _save(fresh(_described(new.config, "new.config"), head, seed), dst, carry=None)
    path = Path(new.config)
    return _save(fresh(_described(files.read_json(path), path), head, seed), dst, carry=path.parent)


def _save(model: nn.Module, dst: Path, carry: Path | None, overwrite: bool = False) -> Path:
    """The checkpoint directory, whole or not at all, with the tokenizer's files of `carry`."""
    with files.committed(dst, overwrite=overwrite) as temporary, _quiet():
        model.save_pretrained(temporary)
        for name in CARRIED if carry else ():
            if (Path(carry) / name).exists():
                shutil.copyfile(reading.inside(Path(carry), name), temporary / name)
    return Path(dst)
