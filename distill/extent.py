"""How long a stage trains and where in the stream of rows it begins; from its recipe and what earlier stages left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from distill.cost import Cost, as_much_as, steps_for
from growth.console import count, say
from growth.errors import UserError

if TYPE_CHECKING:
    from distill.context import Context
    from distill.corpus.store import Corpus
    from distill.kinds import Stage, TrainSpec

WORDS = {"steps": "steps", "tokens": "tokens", "flops": "FLOPs"}


def offset(spec: TrainSpec, context: Context) -> int:
    """The place in the stream of rows at which a stage begins."""
    return 0 if isinstance(spec.data, str) else context.metrics(spec.data.after)["position"]


def steps(name: str, spec: TrainSpec, context: Context, corpus: Corpus, cost: Cost) -> int:
    """How many updates a stage makes; says so where that follows from another one, or where rows must repeat."""
    needed = _like(name, spec, context, corpus, cost) if spec.stop.like else _own(spec.stop, spec.optim.batch, corpus)
    if repeats := _repeats(spec, needed * spec.optim.batch / len(corpus), offset(spec, context) / len(corpus)):
        say(f"{name}: {repeats}")
    return needed


def spent(context: Context, measure: str) -> Callable[[Stage], int]:
    """What finished stages took, in steps, tokens or flops."""

    def read(stage: Stage) -> int:
        found = context.metrics(stage.id)
        if measure not in found:
            raise UserError(
                f"{stage.id} was trained before {WORDS[measure]} were counted; again with --from {stage.id}"
            )
        return found[measure]

    return read


def _own(stop, batch: int, corpus: Corpus) -> int:
    if stop.steps is not None:
        return stop.steps
    rows = stop.epochs * len(corpus) if stop.epochs is not None else stop.tokens / corpus.tokens * len(corpus)
    return max(math.ceil(rows / batch), 1)


def _like(name: str, spec: TrainSpec, context: Context, corpus: Corpus, cost: Cost) -> int:
    """As much as another stage with all that it was made from."""
    recipe, other = context.recipe, spec.stop.like
    amount = as_much_as(recipe, other, spent(context, recipe.equal))
    tokens = spec.optim.batch / len(corpus) * corpus.tokens
    needed = steps_for(amount, recipe.equal, tokens, cost.mean)
    before = " and what it was made from" if len(list(recipe.made_from(other))) > 1 else ""
    total = f"{amount:.3g}" if recipe.equal == "flops" else count(amount)
    say(f"{name}: as many {WORDS[recipe.equal]} as {other}{before}: {total}, {needed} steps")
    return needed


def _repeats(spec: TrainSpec, needed: float, seen: float) -> str | None:
    """Epochs that a stage needs, and that were seen before it; silent where the recipe asks for them by number."""
    if needed + seen <= 1 or (spec.stop.epochs and not seen):
        return None
    already = f", and {spec.data.after} has seen {seen:.1f}" if seen else ""
    return f"needs {needed:.1f} epochs of {spec.corpus}{already}: rows repeat"
