"""Models at rest: checkpoints in, checkpoints out."""

from growth.checkpoint import Checkpoint, open, write
from growth.cut import cut
from growth.depth import insert, stack
from growth.inspect import inspect
from growth.merge import merge
from growth.operate import Output
from growth.plan import plan
from growth.upcycle import upcycle
from growth.verify import verify
from growth.vocabulary import vocabulary
from growth.width import widen

__all__ = [
    "Checkpoint",
    "Output",
    "cut",
    "insert",
    "inspect",
    "merge",
    "open",
    "plan",
    "stack",
    "upcycle",
    "verify",
    "vocabulary",
    "widen",
    "write",
]
