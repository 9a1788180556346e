"""Models: what they are, and how a student starts.

`resolve` says where a model is, `load` makes it safe, `facts` describes it before any weight is read.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from distill import classifiers, growing, layout, loading, taps
from distill.drawn import Drawn, fresh, planned
from distill.loading import load
from distill.operators import Cut, Given
from distill.sources import resolve, weights_sha256
from distill.sparsity import stored
from growth import checkpoint as reading
from growth import files
from growth.console import say
from growth.errors import UserError
from growth.families import FAMILIES
from growth.memory import pieces
from growth.pieces import Piece
from growth.shards import bytes_of, write_shards
from growth.writer import CARRIED, LINEAGE

__all__ = ["Facts", "export", "facts", "freeze", "fresh", "load", "resolve", "seed_checkpoint", "weights_sha256"]


Make = Callable[[], torch.Tensor]  # of one tensor, when its turn comes


def freeze(model: nn.Module) -> nn.Module:
    """A teacher: in eval mode, without gradients."""
    return model.eval().requires_grad_(False)


@dataclass(frozen=True)
class Facts:
    """What objectives must know of a model before any weight is loaded; widths are those of the tapped tensors."""

    family: str
    layers: int
    heads: int | None  # None where attention cannot be tapped
    kv_heads: int | None
    widths: dict[str, int]  # query, key, value: heads x head size, which need not be the hidden size; hidden
    vocab: int
    causal: bool
    positions: int | None  # tokens that a row may have; None where positions are computed, without a table
    parameters: int  # of the class that config.json names; tied ones count once
    blocks: tuple[int, ...]  # weights that a token is multiplied with: of each block,
    body: int  # of the base model, without tables that are only looked up,
    head: int  # of the language-model head with a table it shares; 0 where there is none
    kind: str | None = None  # of the head that it has: mlm, causal or classify
    kinds: tuple[str, ...] = ()  # of the heads that it could have
    rebuilt: int = 0  # FLOPs of a forward and backward pass that no token asks for: matrices built from factors

    @property
    def attention(self) -> int:
        """Channels over which each block compares tokens."""
        return self.widths.get("query", self.widths["hidden"])


MASKS = (None, (1, 1, 2, 2), (1, 2))  # every family takes one of these without reading a value of it


def facts(source) -> Facts:
    """Facts of a checkpoint directory, of the content of a config.json or of a configuration.

    Measured with the taps on a model without storage.
    """
    config = source if isinstance(source, transformers.PreTrainedConfig) else loading.configuration(source)
    base = loading.skeleton(loading.class_of(config, None), config, {})
    base.config._experts_implementation = "batched_mm"  # the one that asks for no values
    whole = loading.architecture(config)
    body, head = _multiplied(config, base)
    shapes = _shapes(base)
    return Facts(
        family=config.model_type,
        layers=config.num_hidden_layers,
        heads=shapes["query"][1] if "query" in shapes else None,
        kv_heads=shapes["key"][1] if "key" in shapes else None,
        widths={role: s[1] * s[3] if role in taps.IN_ATTENTION else s[2] for role, s in shapes.items()},
        vocab=config.vocab_size,
        causal=loading.causal(config),
        positions=layout.longest(config),
        parameters=_size(loading.skeleton(whole, config, {}) if whole else base),
        blocks=tuple(_taking_part(block, config) for block, _ in taps.layers(base)),
        body=body,
        head=head,
        kind=loading.own_head(config),
        kinds=tuple(loading.heads(type(config))),
    )


def _shapes(base: nn.Module) -> dict[str, tuple[int, ...]]:
    """Of what can be tapped, by role."""
    roles = (*taps.IN_ATTENTION, "hidden") if taps.interfaced(base) else ("hidden",)
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    for shape in MASKS:
        mask = shape and torch.zeros(shape, device="meta")
        reads = suppress(RuntimeError, ValueError, IndexError)
        try:
            with reads, torch.no_grad(), taps.tap(base, [(role, -1) for role in roles]) as seen:
                base(ids, attention_mask=mask)
                return {role: tuple(value.shape) for (role, _), value in seen.items()}
        except loading.UNFIT as error:
            raise UserError(f"{type(base).__name__} cannot run as its config says: {loading.reason(error)}") from error
    raise UserError(f"{type(base).__name__} reads values of its mask, so it cannot be measured without its weights")


def _multiplied(config, base: nn.Module) -> tuple[int, int]:
    """(what a token is multiplied with in the body, in the head; a table that they share is the head's)."""
    kinds = loading.headed(type(config))
    model = loading.skeleton(next(iter(kinds.values())), config, {}) if kinds else base
    body, table = model.base_model, model.get_input_embeddings().weight
    tied = model is not base and model.get_output_embeddings().weight is table
    again = [block for block, turn in taps.layers(body) if turn]  # ALBERT's
    head = _taking_part(model, config) - _taking_part(body, config) + (table.numel() if tied else 0)
    return sum(_taking_part(module, config) for module in (body, *again)), head


def _taking_part(module: nn.Module, config) -> int:
    """Weights of matrices, of a layer's experts as many as a token is sent to; in memory they have three axes."""
    family = FAMILIES.get(config.model_type)
    experts = (family.sizes_of(config.to_dict()).get("experts") if family else None) or 1
    used = config.num_experts_per_tok if experts > 1 else 1
    tables = {part.weight for part in module.modules() if isinstance(part, nn.Embedding)}
    matrices = [p for p in module.parameters() if p.dim() > 1 and p not in tables]
    return sum(p.numel() * used // experts if p.dim() == 3 else p.numel() for p in matrices)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def seed_checkpoint(
    student,
    resolve_ref: Callable[[str], Path],
    dst: Path,
    head: str | None,
    seed: int,
    corpus: Path | None = None,
    classes: Sequence[str] | None = None,
    masks: Path | None = None,
) -> Path:
    """The student before its first step, as safetensors: the same for every ZeRO stage and number of ranks.

    One of random weights takes the tokenizer of its corpus with it, any other its own. `classes`: of a head that
    classifies. `masks`: the checkpoint whose masks are laid over it, else it has those of what it was made from.
    """
    source = student.origin and resolve_ref(student.origin)
    if source is None:
        tokenizer = corpus and corpus / "tokenizer"
        config = _new_config(student.new, resolve_ref)
        config = classifiers.named(config, classes) if classes else config
        return _begin(config, head, seed, dst, tokenizer, masks)
    if student.from_:
        return _continue(source, dst, head, seed, classes, masks)
    ops = student.grow.operators() if student.grow else [("cut", Cut(layers=student.cut.layers))]
    scratch = Path(dst).with_name(f"{Path(dst).name}.grown")
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    try:
        grown = growing.apply(ops, source, scratch, Given(seed, resolve_ref, corpus and (lambda: corpus)))
        return _continue(grown, dst, head, seed, classes, masks)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _begin(config, head: str | None, seed: int, dst: Path, tokenizer: Path | None, masks: Path | None) -> Path:
    """Random weights, one tensor in memory at a time; all of them where masks are laid over, or no rehearsal works."""
    drawn = Drawn(planned(config, head), seed)
    if masks or not drawn.whole:
        return save(fresh(config, head, seed), dst, carry=tokenizer, masks=masks)
    return save(drawn.model, dst, carry=tokenizer, tensors=drawn.pieces())


def export(start: Path, trained: Mapping[str, Make], dst: Path, beside: Callable[[Path], None] | None = None) -> Path:
    """What was trained, by parameter name; everything else as it was at the start, the tokenizer too.

    How the start was grown is told still, but what it promised to compute is over. `beside` as in `save`.
    """
    model = load(start, loading.own_head(loading.configuration(start)))
    story, tensors = {"preserves": "no"}, trained_pieces(model, trained)
    return save(model, dst, carry=start, overwrite=True, story=story, beside=beside, tensors=tensors)


def trained_pieces(model: nn.Module, trained: Mapping[str, Make]) -> Iterator[tuple[str, Piece]]:
    """The tensors of a checkpoint: those that were trained, by parameter name, made when their turn comes.

    The others are those of the model: mapped from a file, they take no memory.
    """
    places = {loading.inside(name, model): p for name, p in model.named_parameters()}
    made = {places[loading.inside(name, model)]: make for name, make in trained.items()}
    yield from pieces(model, lambda p: made[p]().to(p.dtype).view(p.shape) if p in made else p.detach())
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    buffers = {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}
    yield from revert_weight_conversion(model, buffers).items()


def _continue(
    source: Path, dst: Path, head: str | None, seed: int, classes: Sequence[str] | None, masks: Path | None
) -> Path:
    """With the head asked for, else with the one the checkpoint has: not to train it is no reason to lose it."""
    head = head or loading.own_head(loading.configuration(source))
    if classes is None:
        model = load(source, head, seed=seed)
    elif classifiers.names(loading.configuration(source)):
        model = classifiers.load(source, classes)
    else:
        model = _with_new_head(source, classes, seed)
    return save(model, dst, carry=source, masks=masks or source)


def _with_new_head(source: Path, classes: Sequence[str], seed: int) -> nn.Module:
    """A classifier of these classes, random but for the base model of a checkpoint."""
    model = fresh(classifiers.named(loading.configuration(source), classes), "classify", seed)
    model.base_model.load_state_dict(load(source).state_dict(), strict=False)  # one side may have no pooler
    say(f"{source} has no classification head; one for {len(classes)} classes starts at random")
    return model


def _new_config(new, resolve_ref: Callable[[str], Path]):
    if new.like is not None:
        return loading.configuration(resolve_ref(new.like))
    if isinstance(new.config, dict):
        return loading.configuration(new.config)
    path = Path(new.config).expanduser()
    return loading.configuration(files.read_json(path), path)


def save(
    model: nn.Module,
    dst: Path,
    carry: Path | None,
    overwrite: bool = False,
    story: Mapping[str, str] | None = None,
    beside: Callable[[Path], None] | None = None,
    masks: Path | None = None,
    tensors: Iterable[tuple[str, Piece]] | None = None,
) -> Path:
    """The checkpoint directory, whole or not at all, with the tokenizer and the lineage of `carry`.

    `story` is what the lineage must say otherwise; `beside` writes files of its own into the directory; `masks` is the
    checkpoint whose masks, if it has any, are laid over the model. `tensors`: its own, made when their turn comes.
    """
    held = stored.laid_over(model, masks) if masks else {}
    files.ensure_space(dst, sum(p.numel() * p.element_size() for p in model.parameters()), "a model")
    with files.committed(dst, overwrite=overwrite) as temporary, loading.quiet():
        try:
            _write(model, temporary, tensors)
        except SafetensorError as error:  # a disk that fills up in the middle; not an OSError
            raise UserError(f"cannot write {dst}: {error}") from error
        if carry:
            carry_tokenizer(Path(carry), temporary)
        if carry and (Path(carry) / LINEAGE).exists():
            lineage = files.read_json(reading.inside(Path(carry), LINEAGE))
            files.write_json(temporary / LINEAGE, {**lineage, **(story or {})})
        if held:
            stored.write(temporary, held)
        if beside:
            beside(temporary)
    return Path(dst)


def _write(model: nn.Module, directory: Path, tensors: Iterable[tuple[str, Piece]] | None) -> None:
    if tensors is None:
        model.save_pretrained(directory)
    else:
        model.save_pretrained(directory, state_dict={})  # what stands beside the weights
        write_shards(directory, tensors, bytes_of("50GB"))  # as transformers has it


def carry_tokenizer(source: Path, dst: Path) -> None:
    """Its files, and others that no tensor depends on."""
    for name in CARRIED:
        if (source / name).exists():
            shutil.copyfile(reading.inside(source, name), dst / name)
