"""With which optimizers what is zero stays zero. No torch.

Of a weight, a gradient and moments that are zero they make an update of zero. Measured, each over 30 steps on ZeRO's
torch optimizers; not so where an update mixes weights: an orthogonalised matrix has no zeros left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

KEEP_ZEROS = frozenset(
    ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adagrad", "RMSprop", "Rprop", "Adadelta", "ASGD", "Adafactor")
)
MIX = {  # what is in a name -> why
    ("muon",): "its update is an orthogonalised matrix, in which dead weights come to life",
    ("shampoo",): "it multiplies gradients by matrices, which brings dead weights to life",
    ("soap",): "it turns gradients into another basis, in which dead weights come to life",
    ("galore", "fira", "apollo"): "it projects gradients, which brings dead weights to life",
    ("lion",): "DeepSpeed's takes the sign of zero for one, and moves dead weights by the whole learning rate",
    ("onebit", "1-bit", "zeroone"): "it feeds errors of compression back, which brings dead weights to life",
}
ROUNDED = ("zero_quantized_gradients", "zero_quantized_weights")  # a range of values whose zero need not be one of them


def why_not(name: str) -> str | None:
    """Why masks cannot be kept with an optimizer of this name; None where they can."""
    if name.lower() in {known.lower() for known in KEEP_ZEROS}:
        return None
    why = mixing(name) or "whether zeros stay zero is not known of it"
    return f"masks cannot be kept with {name}: {why}; adamw can"


def mixing(name: str) -> str | None:
    """How an optimizer of this name brings dead weights to life, if it is known to."""
    return next((why for parts, why in MIX.items() if any(part in name.lower() for part in parts)), None)


def of_engine(told: Mapping[str, Any]) -> Iterator[str]:
    """What of a `deepspeed:` block cannot be with masks."""
    kind = told.get("optimizer")
    if isinstance(kind, dict) and isinstance(kind.get("type"), str) and (why := why_not(kind["type"])):
        yield f"engine.deepspeed.optimizer: {why}"
    zero = told.get("zero_optimization")
    for key in ROUNDED if isinstance(zero, dict) else ():
        if zero.get(key):
            yield f"engine.deepspeed.zero_optimization.{key}: rounding so brings dead weights to life; leave it out"
