"""What runs in the place of a module's forward; and blocks that run again in backward (activation checkpointing)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint

from growth.errors import UserError

CACHES = ("past_key_values", "past_key_value", "layer_past")


@contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Inside, `forward` runs in the place of the module's; hooks stay around it."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def called(module: nn.Module, around: Callable[[Callable], Callable]) -> Iterator[None]:
    """Inside, `around` is put around every call of the module: around its hooks, and around what is compiled of it.

    torch keeps what a compiled module runs in an attribute, and runs it in the place of all else.
    """
    own = vars(module)  # past __setattr__: the wrapper that torch.compile makes hands attributes on to what is inside
    before = own.get("_compiled_call_impl")
    own["_compiled_call_impl"] = around(before or module._call_impl)
    try:
        yield
    finally:
        del own["_compiled_call_impl"]
        if before is not None:
            own["_compiled_call_impl"] = before


class Recomputed:
    """A forward whose inside is not kept for backward but runs again there; `around` is put around it both times."""

    def __init__(self, run: Callable, around: Callable[[Callable], Callable] = lambda run: run):
        self.run, self.around = run, around

    def __call__(self, *args, **kwargs):
        if any(kwargs.get(name) is not None for name in CACHES):
            raise UserError("a block that fills a key-value cache cannot run again in backward; set use_cache=False")
        return checkpoint(self.around(self.run), *args, use_reentrant=False, **kwargs)

    def within(self, around: Callable[[Callable], Callable]) -> Recomputed:
        """With one thing more around what runs."""
        return Recomputed(self.run, lambda run: around(self.around(run)))


@contextmanager
def recomputed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these run again in backward (Chen et al. 2016, arXiv 1604.06174).

    The gradient is the same to the bit; memory holds what goes into the blocks and the inside of one of them. The
    switch that transformers has does nothing in eval mode, which a student without dropout is in, and for ALBERT.
    """
    with ExitStack() as undo:
        for block in dict.fromkeys(blocks):
            undo.enter_context(replaced(block, Recomputed(block.forward)))
        yield
