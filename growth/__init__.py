"""Models at rest: checkpoints in, checkpoints out."""

from growth.checkpoint import Checkpoint, open, write
from growth.cut import cut
from growth.depth import insert, stack
from growth.inspect import inspect
from growth.learn import learn
from growth.merge import merge
from growth.moments import moments
from growth.operate import Output
from growth.plan import plan
from growth.sparsity import densify, sparsify
from growth.undo import undo
from growth.upcycle import upcycle
from growth.verify import verify
from growth.vocabulary import vocabulary
from growth.width import widen

__all__ = [
    "Checkpoint",
    "Output",
    "cut",
    "densify",
    "insert",
    "inspect",
    "learn",
    "merge",
    "moments",
    "open",
    "plan",
    "sparsify",
    "stack",
    "undo",
    "upcycle",
    "verify",
    "vocabulary",
    "widen",
    "write",
]
