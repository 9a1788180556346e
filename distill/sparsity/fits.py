"""What of masks cannot work, told from a recipe before any weight is read. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from distill import sources
from distill.sparsity.optimizers import of_engine, why_not
from distill.sparsity.values import Mask, Sparsify
from growth.bits import FILE
from growth.errors import UsageError
from growth.gradual import Gradual

KEEP = "hooks: [{mask: {}}] keeps them, a grow stage with `densify` drops them"


def is_sparse(reference: str | None, planned: Any) -> bool:
    """Whether a model has masks, or a stage will."""
    if reference is None:
        return False
    if reference in planned.recipe.models:
        return (sources.encoder(planned.context.model(reference)) / FILE).is_file()
    name, _, start = reference.partition(".")
    stage = planned.recipe.stage(name)
    if stage.grow:
        return _after(stage.grow.operators(), is_sparse(stage.grow.from_, planned))
    masked, own = _hooks(stage.train)
    return bool(masked) if not start else starts_sparse(stage.train, planned) or bool(own and own.from_)


def starts_sparse(train: Any, planned: Any) -> bool:
    """Whether what a student is made of has masks."""
    student = train.student
    sparse = is_sparse(student.origin, planned)
    return _after(student.grow.operators(), sparse) if student.grow else sparse


def _after(ops: Iterable[tuple[str, Any]], sparse: bool) -> bool:
    """Operators take masks along or refuse them."""
    for name, _ in ops:
        sparse = {"sparsify": True, "densify": False}.get(name, sparse)
    return sparse


def _hooks(train: Any) -> tuple[list[Mask | Sparsify], Mask | None]:
    """Those that keep masks, and the one that keeps them as they are."""
    found = [hook for hook in train.hook_values() if isinstance(hook, Mask | Sparsify)]
    return found, next((hook for hook in found if isinstance(hook, Mask)), None)


def misfits(stage: Any, planned: Any) -> Iterator[str]:
    """Of a train stage."""
    train, (found, mask) = stage.train, _hooks(stage.train)
    sparse = starts_sparse(train, planned)
    if not found:
        if sparse:
            yield f"student: {train.student.origin} is sparse, and nothing keeps its masks while it trains: {KEEP}"
        return
    if len(found) > 1:
        yield "hooks: sparsify keeps the masks of its start already; leave mask out"
    yield from _company(train)
    yield from of_engine(planned.recipe.engine.deepspeed)
    if why := why_not(train.optim.name):
        yield f"optim.name: {why}"
    if mask:
        yield from _of_mask(mask, sparse, planned)
    else:
        yield from _of_change(found[0], sparse, train)


def _company(train: Any) -> Iterator[str]:
    """What does not go together with masks."""
    if train.ranks:
        yield "hooks: masks are of language models; sparsify the encoder, train it as one, then make it a ranker"
    if train.student.lowrank:
        yield "hooks: masks are of whole matrices, and student.lowrank makes factors of them; one of both"
    if any(name == "submodel" for name, _ in (hook.named() for hook in train.hooks)):
        yield "hooks: masks of blocks that a submodel leaves out would be counted as if they ran; one of both"


def _of_mask(mask: Mask, sparse: bool, planned: Any) -> Iterator[str]:
    if mask.from_ and not is_sparse(mask.from_, planned):
        yield f"hooks.mask.from: {mask.from_} has no masks; `sparsify` in a grow stage draws them"
    if not mask.from_ and not sparse:
        yield "hooks.mask: the student has no masks; a grow stage with `sparsify` draws some, `from` names others"


def _of_change(hook: Sparsify, sparse: bool, train: Any) -> Iterator[str]:
    if hook.how != "magnitude" and not sparse:
        yield f"hooks.sparsify: {hook.how} moves live weights of a sparse student, and this one is dense; `sparsify` it"
    if hook.sparsity is not None and train.stop.steps is not None:
        try:
            Gradual(hook.sparsity, train.stop.steps, hook.every, *hook.compute)
        except UsageError as error:
            yield f"hooks.sparsify: {error}"
