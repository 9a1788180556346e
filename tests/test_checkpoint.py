"""Checkpoints at rest: hostile and damaged ones are refused by name, written ones are whole and plain."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import growth
from growth.checkpoint import write
from growth.errors import UserError
from growth.pieces import Computed, Fill
from growth.ranges import BYTES, TORCH, dtype_name, torch_dtype
from growth.shards import bytes_of

CONFIG = {"model_type": "gpt2", "vocab_size": 7, "n_positions": 5, "n_embd": 6, "n_head": 2, "n_layer": 1}


def tensors(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in (("b", (3, 4)), ("a", (5,)), ("c", ()))}


@pytest.fixture
def whole(tmp_path):
    """A directory with one good file."""
    return write(tmp_path / "good", CONFIG, tensors().items())


@pytest.fixture
def sharded(tmp_path):
    """A directory with three shards and an index."""
    return write(tmp_path / "good", CONFIG, tensors().items(), shard_size=20)


def raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def field(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def refused(directory, *words):
    """One line that names the file and the trouble, quickly and without memory."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError) as error:
        growth.open(directory)
    said = str(error.value)
    assert "\n" not in said and all(word in said for word in words), said
    assert time.monotonic() - started < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000  # kB


def test_what_is_written_is_read_back_lazily_to_the_bit(whole):
    checkpoint = growth.open(whole)
    assert checkpoint.config == CONFIG and len(checkpoint.files) == 1 and len(checkpoint) == 3
    assert checkpoint["b"].dtype == "F32" and checkpoint["b"].shape == (3, 4) and checkpoint.nbytes == 72
    assert all(torch.equal(checkpoint.tensor(name), value) for name, value in tensors().items())


def test_a_tensor_in_memory_never_writes_through_to_the_file(whole):
    growth.open(whole).tensor("b").fill_(0)
    assert torch.equal(growth.open(whole).tensor("b"), tensors()["b"])


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "F8_E4M3"])
def test_every_type_survives(tmp_path, dtype):
    value = torch.tensor([[0, 1, 1], [1, 0, 1]]).to(torch_dtype(dtype))
    path = write(tmp_path / "x", CONFIG, [("odd", torch.ones(1, dtype=torch.uint8)), ("x", value), ("no", value[:0])])
    read = growth.open(path)
    assert dtype_name(value.dtype) == dtype == read["x"].dtype
    assert torch.equal(read.tensor("x").float(), value.float()) and read.tensor("no").shape == (0, 3)


def test_the_file_is_to_the_byte_what_safetensors_writes(tmp_path):
    mixed = {f"{kind}.{i}": torch.ones(3, dtype=torch_dtype(kind)) for kind in TORCH for i in (10, 2)} | {
        "ä": torch.ones(1)
    }
    save_file(mixed, tmp_path / "theirs", metadata={"format": "pt"})
    path = write(tmp_path / "ours", CONFIG, reversed(mixed.items()))
    assert (path / "model.safetensors").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert set(BYTES) == set(TORCH)


def test_shards_have_bounded_size_and_an_index(sharded):
    assert sorted(p.name for p in sharded.iterdir()) == [
        "config.json",
        *(f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)),
        "model.safetensors.index.json",
    ]
    assert json.loads((sharded / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 72}
    assert {k: v.shape for k, v in growth.open(sharded).items()} == {k: tuple(v.shape) for k, v in tensors().items()}


def test_the_digest_is_of_the_model_not_of_its_files(whole, tmp_path):
    shards = write(tmp_path / "s", {**CONFIG, "transformers_version": "9"}, tensors().items(), shard_size=20)
    other = write(tmp_path / "o", CONFIG, tensors(1).items())
    names = write(tmp_path / "n", CONFIG, [(name + "x", value) for name, value in tensors().items()])
    config = write(tmp_path / "c", {**CONFIG, "n_layer": 2}, tensors().items())
    same = growth.open(whole).digest()
    assert growth.open(shards).digest() == same
    assert len({same, *(growth.open(path).digest() for path in (other, names, config))}) == 4


def test_values_at_rest_and_computed_ones_are_streamed_as_given(tmp_path, whole):
    entry = growth.open(whole)["b"]
    made = []
    lazy = Computed("F32", (2,), lambda: made.append(1) or torch.tensor([1.0, 2.0]))
    fills = {kind: Fill(kind, (3, 700_000), -1.0) for kind in ("F64", "F32", "F16", "BF16")}
    read = growth.open(write(tmp_path / "x", CONFIG, [("b", entry), ("l", lazy), *fills.items()]))
    assert torch.equal(read.tensor("b"), tensors()["b"]) and read.tensor("l").tolist() == [1, 2] and made == [1]
    assert all((read.tensor(kind) == -1).all() and read[kind].dtype == kind for kind in fills)


def test_without_copy_file_range_the_bytes_are_the_same(tmp_path, whole, monkeypatch):
    def cannot(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "copy_file_range", cannot)
    path = write(tmp_path / "x", CONFIG, growth.open(whole).items())
    assert (path / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


# T07: truncation


@pytest.mark.parametrize("length", [0, 4, 20, -1])
def test_a_truncated_file_is_refused_by_name(whole, length):
    file = whole / "model.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    refused(whole, "model.safetensors", "truncated")


def test_trailing_bytes_are_refused(whole):
    with (whole / "model.safetensors").open("ab") as file:
        file.write(b"x")
    refused(whole, "model.safetensors", "too long")


# T09: duplicates, and indexes that disagree with shards


def test_a_tensor_that_stands_twice_is_refused(whole):
    a = json.dumps(field([1], 0, 4))
    raw(whole / "model.safetensors", f'{{"a": {a}, "a": {a}}}'.encode(), b"1234")
    refused(whole, "model.safetensors", "key 'a' stands twice")


def index_of(directory, change):
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda where: where.update(ghost=where["a"]), ["lacks ghost"]),
        (lambda where: where.update(a=where["b"]), ["which model.safetensors.index.json places"]),
        (lambda where: where.update(a="model-00009-of-00003.safetensors"), ["model-00009", "does not exist"]),
        (lambda where: where.update(a=5), ["weight_map"]),
        (lambda where: where.clear(), ["holds no tensors"]),
    ],
)
def test_an_index_that_disagrees_with_its_shards_is_refused(sharded, change, words):
    index_of(sharded, change)
    refused(sharded, str(sharded), *words)


def test_a_tensor_in_two_shards_is_refused(sharded):
    index_of(sharded, lambda where: None)
    first, second = (sharded / f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
    save_file({**load_file(first), **load_file(second)}, second)
    refused(sharded, "model-00002", "which model.safetensors.index.json places in model-00001")


def test_a_tensor_that_the_index_lacks_is_refused(sharded):
    shard = sharded / "model-00001-of-00003.safetensors"
    save_file({**load_file(shard), "extra": torch.ones(1)}, shard)
    refused(sharded, "model-00001", "extra", "does not list")


# T10: headers that lie


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": field([2], 0, 4)}, ["a is F32 [2]", "not the 4 bytes"]),
        ({"a": field([1], 0, 4, "F16")}, ["a is F16"]),
        ({"a": field([1], 0, 4, "F33")}, ["dtype 'F33'"]),
        ({"a": field([1], 0, 4, ["F32"])}, ["a has dtype"]),
        ({"a": field([1], 4, 8)}, ["hole"]),
        ({"a": field([1], 0, 4), "b": field([1], 0, 4)}, ["overlaps"]),
        ({"a": field([1], 0, 4), "b": field([1], 8, 12)}, ["b leaves a hole"]),
        ({"a": field([2], 0, 8)}, ["truncated"]),
        ({"a": field([2**40], 0, 4)}, ["a is F32"]),
        ({"a": field([1] * 2**15, 0, 4)}, ["no proper shape"]),
        ({"a": field([2**62, 2**62, 0], 0, 4)}, ["a is F32"]),
        ({"a": field([-1], 0, 4)}, ["no proper shape"]),
        ({"a": field([True], 0, 4)}, ["no proper shape"]),
        ({"a": field([1.0], 0, 4)}, ["no proper shape"]),
        ({"a": field([2**64], 0, 4)}, ["no proper shape"]),
        ({"a": {"dtype": "F32", "shape": [1]}}, ["no proper shape and data_offsets"]),
        ({"a": 5}, ["a has dtype None"]),
        ([1], ["not an object"]),
        (b"[" * 100_000, ["nested too deeply"]),
        (b'{"a":' * 100_000, ["nested too deeply"]),
        (b"\xff\xff", ["utf-8"]),
    ],
    ids=range(21),
)
def test_a_lying_header_is_refused_by_name(whole, header, words):
    raw(whole / "model.safetensors", header, b"1234")
    refused(whole, "model.safetensors", *words)


@pytest.mark.parametrize("length", [99_000_000, 2**40, 2**63])
def test_a_giant_header_is_refused_unread(whole, length):
    with (whole / "model.safetensors").open("wb") as file:
        file.write(length.to_bytes(8, "little"))
        file.truncate(min(length, 99_000_000) + 8)  # sparse
    refused(whole, "model.safetensors", "header")


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1, "a": 2}', "[" * 100_000])
def test_a_broken_config_is_refused(whole, text):
    (whole / "config.json").write_text(text)
    refused(whole, "config.json")


# T13: values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_values_that_are_not_finite_are_named_on_request(tmp_path, dtype):
    largest = torch.full((2,), torch.finfo(dtype).max, dtype=dtype)
    bad = {"fine": largest, "bad": torch.ones(5).to(dtype)}
    growth.open(write(tmp_path / "fine", CONFIG, bad.items())).check_values()
    bad["bad"][3] = float("nan")
    with pytest.raises(UserError, match="bad not finite"):
        growth.open(write(tmp_path / "bad", CONFIG, bad.items())).check_values()


# T14: paths that leave the directory


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/hostname", "sub/x.safetensors", "..", "a\0b", ""])
def test_an_index_entry_that_leaves_the_directory_is_refused_unopened(sharded, name):
    index_of(sharded, lambda where: where.update(a=name))
    refused(sharded, "would leave the directory")


def test_links_out_of_the_directory_are_refused(whole, tmp_path):
    file = whole / "model.safetensors"
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    refused(whole, "model.safetensors", "link out of its directory")
    (tmp_path / "elsewhere").unlink()
    refused(whole, "model.safetensors", "does not exist")


def test_the_links_of_the_hugging_face_cache_are_followed(whole, tmp_path):
    blobs, snapshot = tmp_path / "models--x" / "blobs", tmp_path / "models--x" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(whole.iterdir())):
        file.rename(blobs / str(i))
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    assert len(growth.open(snapshot)) == 3


@pytest.mark.timeout(30)
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_pipes_and_devices_are_refused_without_opening_them(whole, name):
    (whole / name).unlink()
    os.mkfifo(whole / name)
    refused(whole, name, "not a regular file")
    (whole / name).unlink()
    (whole / name).symlink_to("/dev/zero")
    refused(whole, name, "link out of its directory")


# T15: pickle


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickle_is_never_opened(whole, name, tmp_path):
    class Canary:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "canary"),)

    (whole / "model.safetensors").unlink()
    torch.save({"x": Canary()}, whole / name)
    refused(whole, name, "convert it to safetensors")
    assert not (tmp_path / "canary").exists()


def test_a_directory_without_a_model_says_what_is_missing(tmp_path):
    refused(tmp_path / "absent", "is not a checkpoint directory")
    refused(tmp_path, "config.json does not exist")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json")


# writing


def test_the_source_is_never_written_and_only_checkpoints_are_replaced(whole, tmp_path):
    good = growth.open(whole).items()
    for dst in (whole, whole / "inside", whole.parent):
        with pytest.raises(UserError, match="must not lie in each other"):
            write(dst, CONFIG, good, carry=whole, overwrite=True)
    (tmp_path / "link").symlink_to(whole)
    with pytest.raises(UserError, match="must not lie in each other"):
        write(tmp_path / "link", CONFIG, good, carry=whole, overwrite=True)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1").write_text("x")
    with pytest.raises(UserError, match="exists"):
        write(tmp_path / "thesis", CONFIG, good)
    with pytest.raises(UserError, match="is not a checkpoint, so it is not replaced"):
        write(tmp_path / "thesis", CONFIG, good, overwrite=True)


def test_tokenizer_files_are_carried_and_code_is_not(whole, tmp_path):
    for name in ("tokenizer.json", "generation_config.json", "modeling_evil.py", "README.md"):
        (whole / name).write_text("{}")
    (whole / "vocab.txt").symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"vocab\.txt is a link out"):
        write(tmp_path / "x", CONFIG, tensors().items(), carry=whole)
    (whole / "vocab.txt").unlink()
    path = write(tmp_path / "x", CONFIG, tensors().items(), carry=whole, lineage={"operator": "copy"})
    names = {"config.json", "model.safetensors", "growth.json", "tokenizer.json", "generation_config.json"}
    assert {file.name for file in path.iterdir()} == names
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask()}


def umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_one_name_for_two_tensors_is_refused(tmp_path):
    with pytest.raises(UserError, match="written twice"):
        write(tmp_path / "x", CONFIG, [("a", torch.ones(1)), ("a", torch.ones(1))])
    with pytest.raises(UserError, match="written twice"):
        write(tmp_path / "x", CONFIG, [("a", torch.ones(1)), ("a", torch.ones(1))], shard_size=4)
    assert list(tmp_path.iterdir()) == []


def test_sizes_of_shards_are_read_as_written():
    assert [bytes_of(text) for text in ("5GB", "1.5mb", 7)] == [5 * 10**9, 1_500_000, 7]
    for text in ("5", "GB", "-1GB", "0GB", 0):
        with pytest.raises(UserError, match="shard size"):
            bytes_of(text)


COPY = """
import sys, growth
source = growth.open(sys.argv[1])
growth.write(sys.argv[2], source.config, source.items(), shard_size=20, overwrite=True, carry=sys.argv[1])
assert "torch" not in sys.modules
"""
POINTS = ["write.after_tensor:{}:2", "write.after_shard:{}:2", "write.before_commit:{}", "commit.before_rename:{}"]


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("how", ["kill", "enospc", "raise"])
def test_a_fault_at_any_point_leaves_the_old_output_and_the_source(whole, tmp_path, point, how):
    old = write(tmp_path / "out", CONFIG, tensors(1).items())
    before = {path: growth.open(path).digest() for path in (whole, old)}
    done = subprocess.run(
        [sys.executable, "-c", COPY, whole, old],
        env={**os.environ, "FAULT": point.format(how)},
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert done.returncode == (-signal.SIGKILL if how == "kill" else 1)
    assert ("disk full while writing" in done.stderr) == (how == "enospc")
    assert {path: growth.open(path).digest() for path in before} == before
    left = [path.name for path in tmp_path.iterdir() if path not in before]
    assert len(left) == (how == "kill")


def test_reading_and_copying_never_import_torch(whole, tmp_path):
    subprocess.run([sys.executable, "-c", COPY, whole, tmp_path / "out"], check=True, timeout=30)
    assert growth.open(tmp_path / "out").digest() == growth.open(whole).digest()
