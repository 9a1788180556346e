"""Bytes and lines of files that may be compressed, damaged or hostile: memory stays bounded whatever they hold."""

from __future__ import annotations

import codecs
import gzip
import io
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from growth.console import size
from growth.errors import UserError

PACKED = (".gz", ".zst")
FREE, RATIO = 64 << 20, 200  # a file may unpack to 64 MiB, or to 200 times its size (text packs 3 to 20 times)
WINDOW = 128 << 20  # bytes of history that a zstd frame may ask for
BLOCK = 1 << 16
NOT_TEXT = re.compile("[\0\ud800-\udfff]")


def opened(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked as its name asks."""
    packing = path.suffix.lower()
    if packing not in PACKED:
        return path.open("rb")
    return io.BufferedReader(_Unpacked(path, _gzip(path) if packing == ".gz" else _zstd(path)), BLOCK)


def seekable(path: Path) -> BinaryIO:
    """The same, for formats that are read from their end: unpacked to a temporary file."""
    stream = opened(path)
    if stream.seekable():
        return stream
    whole = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    with stream:
        shutil.copyfileobj(stream, whole)
    whole.seek(0)
    return whole


def lines(stream: BinaryIO, path: Path, longest: int, *, whole: bool = False) -> Iterator[tuple[int, str]]:
    """(line number, text): at most `longest` bytes at once; with `whole`, a longer line is an error."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()  # two pieces of a line may share a character
    number = 1
    while raw := stream.readline(longest):
        if whole and len(raw) == longest and not raw.endswith(b"\n"):
            raise UserError(f"{path}:{number}: the line is longer than {size(longest)}")
        yield number, text(_decoded(decoder, raw, f"{path}:{number}"), f"{path}:{number}")
        number += raw.endswith(b"\n")
    _decoded(decoder, b"", f"{path}:{number}")


def text(value: str, where: str) -> str:
    """Refuse what no tokeniser can take."""
    if found := NOT_TEXT.search(value):
        what = "a NUL character" if found[0] == "\0" else f"half a character, \\u{ord(found[0]):04x}"
        raise UserError(f"{where}: {what}; this is not text in UTF-8")
    return value


class Budget:
    """What may still come out of a file; without it a few kilobytes fill a disk."""

    def __init__(self, path: Path):
        self.path, self.packed = path, path.stat().st_size
        self.left = max(FREE, RATIO * self.packed)

    def spend(self, n: int) -> None:
        self.left -= n
        if self.left < 0:
            raise UserError(
                f"{self.path}: unpacks to more than {RATIO} times its size ({size(self.packed)}); "
                "if that is right, unpack it first"
            )


class _Unpacked(io.RawIOBase):
    """A stream over unpacked blocks."""

    def __init__(self, path: Path, blocks: Iterator[bytes]):
        self.blocks, self.budget, self.rest = blocks, Budget(path), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self.rest:
            self.rest = next(self.blocks, b"")
            self.budget.spend(len(self.rest))
        n = min(len(buffer), len(self.rest))
        buffer[:n], self.rest = self.rest[:n], self.rest[n:]
        return n

    def close(self) -> None:
        self.blocks.close()
        super().close()


def _decoded(decoder, raw: bytes, where: str) -> str:
    try:
        return decoder.decode(raw, final=not raw)
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise UserError(f"{where}: not UTF-8 (byte 0x{wrong:02x}); save the file as UTF-8") from None


def _gzip(path: Path) -> Iterator[bytes]:
    try:
        with gzip.open(path) as file:
            while block := file.read(BLOCK):
                yield block
    except (EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path}: damaged gzip file: {error}") from error


def _zstd(path: Path) -> Iterator[bytes]:
    """Frame by frame: zstandard's own stream reader ends without a word where a truncated file does."""
    try:
        import zstandard
    except ImportError:
        raise UserError(f"{path}: .zst needs the package zstandard: pip install zstandard") from None
    unpacker, frame = zstandard.ZstdDecompressor(max_window_size=WINDOW), None
    try:
        with path.open("rb") as file:
            while data := file.read(1024):  # 1 KiB in is 32 MiB out at most
                while data:
                    frame = frame or unpacker.decompressobj()
                    if block := frame.decompress(data):
                        yield block
                    data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise UserError(f"{path}: damaged zstd file: {error}") from error
    if frame is not None:
        raise UserError(f"{path}: damaged zstd file: it ends in the middle of a frame")
