"""The ground floor: whole directories or none, digests, locks, and the places where tests let things break."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from growth.console import FULL, say, size
from growth.errors import UserError

LARGEST_JSON = 100_000_000  # bytes; no honest config, index or header is longer


@contextmanager
def committed(final: str | Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory that becomes `final` when the block ends well, and vanishes when it does not.

    Every file is on the disk before the rename, so that at any kill point `final` is the old directory, the new
    one, or absent: never a mix.
    """
    final = Path(os.path.abspath(final))
    if os.path.lexists(final) and not overwrite:
        raise UserError(f"{final} exists; give another path or --overwrite")
    temporary, lock = _temporary(final)
    try:
        yield temporary
        fault("commit.before_fsync")
        _settle(temporary)
        fault("commit.before_rename")
        _put(temporary, final)
        fault("commit.after_rename")
    except OSError as error:
        if error.errno in FULL:
            free = size(shutil.disk_usage(final.parent).free)
            raise UserError(
                f"disk full while writing {final} ({error.strerror}, {free} free); what was there before is intact"
            ) from error
        raise
    finally:
        if os.path.lexists(temporary):  # the unfinished new one, or the old one after an exchange
            _remove(temporary)
        os.close(lock)


def _temporary(final: Path) -> tuple[Path, int]:
    """A locked directory beside `final`; those of dead processes are removed."""
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f"{_literal(final.name)}.tmp-*"):
            _sweep(left)
        temporary = final.with_name(f"{final.name}.tmp-{secrets.token_hex(4)}")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"cannot write {final}: {error.strerror}") from error
    lock = os.open(temporary, os.O_RDONLY)
    _try_lock(lock)
    return temporary, lock


def _literal(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _sweep(left: Path) -> None:
    handle = os.open(left, os.O_RDONLY)
    try:
        if _try_lock(handle):  # its writer holds this lock for as long as it lives
            say(f"removing {left}, left behind by a run that was killed")
            _remove(left)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _settle(directory: Path) -> None:
    """All of it on the disk, and readable as the umask allows (safetensors writes 0600)."""
    mode = directory.stat().st_mode & 0o666  # mkdir has applied the umask for us
    for folder, _, names in os.walk(directory):
        for name in names:
            path = os.path.join(folder, name)
            os.chmod(path, mode)
            _fsync(path)
        _fsync(folder)


def _fsync(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _put(temporary: Path, final: Path) -> None:
    """Rename; an existing `final` changes places with the new directory in one step."""
    if not os.path.lexists(final):
        os.rename(temporary, final)
    elif not _exchange(temporary, final):
        old = final.with_name(f"{final.name}.old-{secrets.token_hex(4)}")  # no sweep ever takes this name
        os.rename(final, old)
        os.rename(temporary, final)
        _remove(old)
    _fsync(final.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Linux' renameat2(RENAME_EXCHANGE); False where the system or file system has none."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def write_text(path: str | Path, text: str) -> None:
    write_bytes(path, [text.encode()])


def write_bytes(path: str | Path, blocks: Iterable[Any]) -> None:
    """The whole file or the old file; blocks are bytes or whatever else has a buffer."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            for block in blocks:
                file.write(block)
            file.flush()
            fault("write.before_fsync")
            os.fsync(file.fileno())
        fault("write.before_rename")
        os.replace(temporary, path)
        _fsync(path.parent)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write does not know its file
        raise
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text):  # of a path that is no UTF-8
        text = json.dumps(value, indent=2)
    write_text(path, text + "\n")


def read_json(path: str | Path) -> Any:
    """The value in a regular file of sane size; whatever is wrong with it is said by name."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist")
    facts = path.stat()
    if not stat.S_ISREG(facts.st_mode):
        raise UserError(f"{path} is not a regular file")
    if facts.st_size > LARGEST_JSON:
        raise UserError(f"{path} has {size(facts.st_size)}, more than any honest JSON file here")
    return parse_json(path.read_bytes(), path)


def parse_json(data: bytes, where: str | Path) -> Any:
    """JSON in which no key stands twice (the usual readers take the last one in silence)."""
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r} stands twice")
    return unique


def sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _streamed(file)


def _streamed(file) -> str:  # Python 3.10
    state = hashlib.sha256()
    while block := file.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def digest(value: Any) -> str:
    """sha256 of the canonical JSON of a value: key order and spaces do not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def locked(directory: str | Path) -> Iterator[None]:
    """One run per directory. The system drops the lock of a dead process, so a stale file is simply taken over."""
    path = Path(directory) / ".lock"
    handle = _open_lock(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(handle)


def _open_lock(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if not _try_lock(handle):
            holder = os.read(handle, 1000).decode(errors="replace") or "another process"
            os.close(handle)
            raise UserError(f"{path.parent} is in use by {_holder(holder)}")
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            return handle
        os.close(handle)  # the last holder removed the file between our open and our lock


def _holder(text: str) -> str:
    try:
        facts = json.loads(text)
        return f"process {facts['pid']} on {facts['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"


def ensure_space(path: str | Path, needed: int, what: str) -> None:
    """Refuse before the work what could not be written after it."""
    place = Path(os.path.abspath(path))
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(f"{what} needs {size(needed)} ({needed} bytes) at {path}, {size(free)} ({free} bytes) are free")


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
_passed: dict[str, int] = {}


def fault(point: str) -> None:
    """A place where a test makes things break: `FAULT=point:kill|stop|term|hang|raise|enospc[:nth]`.

    With `FAULT_RANK` in that one of many processes alone. Nothing when unset.
    """
    wanted = os.environ.get("FAULT")
    if not wanted or not wanted.startswith(f"{point}:"):
        return
    if os.environ.get("FAULT_RANK", here := os.environ.get("RANK", "0")) != here:
        return
    how, _, nth = wanted.removeprefix(f"{point}:").partition(":")
    _passed[point] = _passed.get(point, 0) + 1
    if _passed[point] == int(nth or 1):
        _break(point, how)


def _break(point: str, how: str) -> None:
    if how in SIGNALS:
        os.kill(os.getpid(), SIGNALS[how])
        return
    while how == "hang":
        time.sleep(3600)
    if how == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), point)
    raise RuntimeError(f"fault at {point}")
