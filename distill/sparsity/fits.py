"""What of masks cannot work, told from a recipe before any weight is read. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from distill import sources
from distill.sparsity.optimizers import of_engine
from distill.sparsity.values import Mask, Sparsify
from growth.bits import FILE, read_masks
from growth.errors import UsageError
from growth.gradual import Gradual

Patterns = frozenset[str | None]  # None: of masks without one
DENSE, ANY = frozenset(), frozenset({None})
KEEP = "hooks: [{mask: {}}] keeps them, a grow stage with `densify` drops them"


def is_sparse(reference: str | None, planned: Any) -> bool:
    """Whether a model has masks, or a stage will."""
    return bool(patterns(reference, planned))


def patterns(reference: str | None, planned: Any) -> Patterns:
    """Of the masks that a model has, or a stage will; none: it is dense."""
    if reference is None:
        return DENSE
    if reference in planned.recipe.models:
        path = sources.encoder(planned.context.model(reference)) / FILE
        return frozenset(mask.pattern for mask in read_masks(path).values()) if path.is_file() else DENSE
    name, _, start = reference.partition(".")
    stage = planned.recipe.stage(name)
    if stage.grow:
        return _after(stage.grow.operators(), patterns(stage.grow.from_, planned))
    masked, own = _hooks(stage.train)
    if not masked and not start:
        return DENSE
    kept = patterns(own.from_, planned) if own and own.from_ else _at_start(stage.train, planned)
    return kept or (DENSE if start else ANY)


def _at_start(train: Any, planned: Any) -> Patterns:
    """Of the masks of what a student is made of."""
    student = train.student
    kept = patterns(student.origin, planned)
    return _after(student.grow.operators(), kept) if student.grow else kept


def _after(ops: Iterable[tuple[str, Any]], kept: Patterns) -> Patterns:
    """Operators take masks along or refuse them."""
    for name, op in ops:
        if name == "sparsify":
            kept = frozenset({op.pattern})
        elif name == "densify":
            kept = DENSE
    return kept


def _hooks(train: Any) -> tuple[list[Mask | Sparsify], Mask | None]:
    """Those that keep masks, and the one that keeps them as they are."""
    found = [hook for hook in train.hook_values() if isinstance(hook, Mask | Sparsify)]
    return found, next((hook for hook in found if isinstance(hook, Mask)), None)


def misfits(stage: Any, planned: Any) -> Iterator[str]:
    """Of a train stage."""
    train, (found, mask) = stage.train, _hooks(stage.train)
    start = _at_start(train, planned)
    if not found:
        if start:
            yield f"student: {train.student.origin} is sparse, and nothing keeps its masks while it trains: {KEEP}"
        return
    if len(found) > 1:
        yield "hooks: sparsify keeps the masks of its start already; leave mask out"
    yield from _company(train)
    yield from of_engine(planned.recipe.engine.deepspeed)
    if mask:
        yield from _of_mask(mask, start, planned)
    else:
        yield from _of_change(found[0], bool(start), train)


def _company(train: Any) -> Iterator[str]:
    """What does not go together with masks."""
    if train.ranks:
        yield "hooks: masks are of language models; sparsify the encoder, train it as one, then make it a ranker"
    if train.student.lowrank:
        yield "hooks: masks are of whole matrices, and student.lowrank makes factors of them; one of both"
    if any(name == "submodel" for name, _ in (hook.named() for hook in train.hooks)):
        yield "hooks: masks of blocks that a submodel leaves out would be counted as if they ran; one of both"


def _of_mask(mask: Mask, start: Patterns, planned: Any) -> Iterator[str]:
    kept = patterns(mask.from_, planned) if mask.from_ else start
    if mask.from_ and not kept:
        yield f"hooks.mask.from: {mask.from_} has no masks; `sparsify` in a grow stage draws them"
    if not mask.from_ and not kept:
        yield "hooks.mask: the student has no masks; a grow stage with `sparsify` draws some, `from` names others"
    if mask.skips:
        yield from (f"hooks.mask.execute: {what}" for what in _of_execution(kept, planned.recipe.engine.precision))


def _of_execution(kept: Patterns, precision: str) -> Iterator[str]:
    """What forward products cannot skip zeros of."""
    from distill import world
    from distill.sparsity.semi_structured import PATTERN, of_machine

    for pattern in sorted(map(str, kept - {PATTERN})):
        found = "without a pattern" if pattern == "None" else pattern
        yield f"masks are {found}, and kernels skip zeros that are 2:4; `pattern: 2:4` of sparsify draws such masks"
    if precision == "fp32":
        yield "kernels for 2:4 are those of 16 bits; engine.precision bf16 or fp16"
    yield from of_machine(world.device())


def _of_change(hook: Sparsify, sparse: bool, train: Any) -> Iterator[str]:
    if hook.how != "magnitude" and not sparse:
        yield f"hooks.sparsify: {hook.how} moves live weights of a sparse student, and this one is dense; `sparsify` it"
    if hook.sparsity is not None and train.stop.steps is not None:
        try:
            Gradual(hook.sparsity, train.stop.steps, hook.every, *hook.compute)
        except UsageError as error:
            yield f"hooks.sparsify: {error}"
