"""Who else is running: ranks, barriers, and work that one rank does for all. Plain torch.distributed, no DeepSpeed."""

from __future__ import annotations

import atexit
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import TypeVar

from distill import watch
from growth.errors import UserError

T = TypeVar("T")
FAILED = "stopped: another rank failed; what it had to say stands above"
SPEAKS = 2.0  # seconds that a rank which failed has for its own message before the others say theirs
LOST = re.compile(r"Connection (reset|closed)|Broken pipe|Timed out waiting")  # gloo's words
COLLECTIVES = timedelta(minutes=30)  # of DeepSpeed, that all ranks come to at about the same time
AGREEMENTS = timedelta(days=1)  # ours: one rank may have hours of work alone while the others wait for it
STORE = "DISTILL_STORE"  # a file that the ranks of `distill run --ranks N` meet through: no port to collide on


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def device():
    """This rank's GPU, or the CPU."""
    import torch

    return torch.device("cuda", local_rank()) if torch.cuda.is_available() else torch.device("cpu")


_agreements = None  # the group for them; None: of whoever joined the process group before us


def start() -> None:
    """Join the process group: a launcher's, the one of `DISTILL_STORE`, or a group of one. Once is enough."""
    global _agreements
    import torch
    import torch.distributed as dist

    if dist.is_initialized():
        return
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local_rank())
    store, method = None, "env://"
    if size() == 1 and "MASTER_ADDR" not in os.environ:
        store, method = dist.HashStore(), None
    elif STORE in os.environ:
        store, method = dist.FileStore(os.environ[STORE], size()), None
    dist.init_process_group(
        # gloo stays for CPU tensors, so that small agreements need no device
        backend="cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        init_method=method,
        store=store,
        rank=rank(),
        world_size=size(),
        timeout=COLLECTIVES,
    )
    if size() > 1:
        _agreements = dist.new_group(backend="gloo", timeout=AGREEMENTS)
    atexit.register(leave)


def leave() -> None:
    """Out of the group. Left to the interpreter's end, gloo's threads outlive it and one process in ten aborts."""
    global _agreements
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        _agreements = None


def leave_at_once(end: SystemExit) -> None:
    """End a process that used torch without unwinding it; any other as always.

    Threads of torch, gloo and DeepSpeed that outlive the interpreter now and then abort a process whose work is done
    and whose files are written ("terminate called without an active exception": one run of two ranks in a few hundred).
    """
    if "torch" not in sys.modules or not isinstance(end.code, int | None):
        raise end
    threading._shutdown()
    atexit.unregister(leave)  # nothing is left to say to the others, and leaving is where gloo joins its threads
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):  # closed, or a pipe that nobody reads
            stream.flush()
    os._exit(end.code or 0)


def barrier() -> None:
    if size() > 1:
        agree(0.0)


def agree(*values: float) -> list[float]:
    """The sums of these numbers over all ranks, in float64."""
    if size() == 1:
        return list(values)
    import torch
    import torch.distributed as dist

    start()
    total = torch.tensor(values, dtype=torch.float64)
    with watch.meeting():
        dist.all_reduce(total, group=_agreements)
    return total.tolist()


def total(tensor):
    """The sum of a tensor over all ranks, in place."""
    if size() > 1:
        import torch.distributed as dist

        start()
        with watch.meeting():
            dist.all_reduce(tensor)
    return tensor


def told(value: T) -> T:
    """What the first rank says, on every rank."""
    if size() > 1:
        import torch
        import torch.distributed as dist

        start()
        said = [value]
        with watch.meeting():
            dist.broadcast_object_list(said, group=_agreements, device=torch.device("cpu"))
        (value,) = said
    return value


def gathered(value: T) -> list[T]:
    """What every rank says, in their order, on every rank."""
    if size() == 1:
        return [value]
    import torch.distributed as dist

    start()
    said: list = [None] * size()
    with watch.meeting():
        dist.all_gather_object(said, value, group=_agreements)
    return said


def first(work: Callable[[], T]) -> T | None:
    """Rank 0 does `work`, the others wait; if it fails, every rank fails (the others with a plain message)."""
    result, failure = None, None
    if rank() == 0:
        try:
            result = work()
        except BaseException as error:  # the others must not be left waiting, whatever it was
            failure = error
    raise_together(failure)
    return result


@contextmanager
def company():
    """A rank that loses another one in the middle of its work says so, instead of where it was waiting."""
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or not LOST.search(str(error)):
            raise
        raise UserError(FAILED) from error


def raise_together(failure: BaseException | None) -> None:
    """Raise on every rank if any rank failed: the rank's own error there, a plain one elsewhere."""
    (failed,) = agree(float(failure is not None))
    if failure is not None:
        raise failure
    if failed:
        time.sleep(SPEAKS)
        raise UserError(FAILED)


def watched(patience: float | None):
    """Inside, a rank that does nothing for `patience` seconds while the others wait for it ends the job."""
    return watch.over(rank(), gathered, patience) if size() > 1 else nullcontext()


@contextmanager
def stop_signal():
    """Yield a function that says whether SIGTERM has come. The second one ends the process at once."""
    came = []

    def note(number, frame):
        if came:
            os._exit(128 + number)
        came.append(number)

    previous = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, previous)
