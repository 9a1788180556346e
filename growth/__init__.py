"""Models at rest: checkpoints in, checkpoints out."""

from growth.checkpoint import Checkpoint, open, write
from growth.cut import cut
from growth.depth import insert, stack
from growth.inspect import inspect
from growth.plan import plan
from growth.verify import verify
from growth.width import widen

__all__ = ["Checkpoint", "cut", "insert", "inspect", "open", "plan", "stack", "verify", "widen", "write"]
