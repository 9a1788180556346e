"""What a damaged or hostile checkpoint gets: a line that says what is wrong, from every command, and no traceback."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from tiny_families import save

import growth
from growth.cli import main
from growth.errors import UsageError
from growth.pieces import packed
from growth.ranges import FLOATS, torch_dtype

MATRIX = "model.layers.1.mlp.up_proj.weight"
COMMANDS = {
    "inspect": lambda src, dst, other: ["inspect", src],
    "stack": lambda src, dst, other: ["stack", src, dst, "--how", "random"],
    "insert": lambda src, dst, other: ["insert", src, dst, "--layers", "2"],
    "widen": lambda src, dst, other: ["widen", src, dst, "--hidden", "96", "--head-size", "20"],
    "cut": lambda src, dst, other: ["cut", src, dst, "--layers", "2", "--ffn", "20", "--vocab", "40"],
    "upcycle": lambda src, dst, other: ["upcycle", src, dst, "--experts", "2"],
    "merge": lambda src, dst, other: ["merge", src, other, dst],
    "vocabulary": lambda src, dst, other: ["vocabulary", src, dst, "--size", "60"],
    "verify": lambda src, dst, other: ["verify", src, other],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return save(tmp_path_factory.mktemp("whole") / "llama", "llama")


@pytest.fixture
def damaged(whole, tmp_path):
    """A copy with other config keys (None: without it), or other tensors."""

    def get(config=None, change=None):
        src = shutil.copytree(whole, tmp_path / "src")
        told = {**json.loads((src / "config.json").read_text()), **(config or {})}
        (src / "config.json").write_text(json.dumps(told))
        if change:
            tensors = load_file(src / "model.safetensors")
            tensors = {name: tensor.contiguous().clone() for name, tensor in change(tensors).items()}
            save_file(tensors, src / "model.safetensors", metadata={"format": "pt"})
        return src

    return get


def every_command(src, whole, home):
    """What each command says to it; those that work leave something that can be inspected."""
    said = {}
    for name, command in COMMANDS.items():
        done = CliRunner().invoke(main, [str(part) for part in command(src, home / name, whole)])
        assert done.exception is None or isinstance(done.exception, SystemExit), (name, done.exception)
        assert done.exit_code in (0, 1, 2)
        if done.exit_code:
            assert done.stderr.splitlines()[-1].startswith("error: ") and not (home / name).exists()
        said[name] = done.stderr if done.exit_code else ""
    assert sorted(path.name for path in home.iterdir() if ".tmp-" in path.name) == []
    return said


@pytest.mark.parametrize(
    ("config", "everywhere"),
    [
        ({"model_type": ["llama"]}, "no table for model_type"),
        ({"model_type": None}, "no table for model_type None"),
        ({"num_key_value_heads": 0}, "group cannot be told"),
        ({"num_attention_heads": "6"}, "group cannot be told"),
        ({"num_hidden_layers": -1}, "a whole number is expected"),
        ({"num_hidden_layers": 10**9}, "but there are 39 tensors"),
        ({"hidden_size": 10**30}, "but config.json says"),
        ({"architectures": [3]}, "a list of class names"),
        ({"architectures": "LlamaForCausalLM"}, "a list of class names"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_every_command(damaged, whole, tmp_path, config, everywhere):
    said = every_command(damaged(config), whole, tmp_path)
    assert all(everywhere in message for message in said.values()), said


@pytest.mark.parametrize(
    ("config", "by_verify"),
    [
        ({"architectures": None}, "names no architecture"),
        ({"architectures": ["os"]}, "transformers has no model os"),
        ({"architectures": ["pipeline"]}, "transformers has no model pipeline"),
        ({"architectures": ["BertModel"]}, "lacks embeddings.LayerNorm.bias of BertModel"),
        ({"rms_norm_eps": "x"}, "cannot load it: Validation error for field 'rms_norm_eps'"),
        ({"rope_parameters": [1]}, "cannot load it"),
        ({"bos_token_id": {}}, "cannot load it"),
    ],
)
def test_a_config_that_no_class_takes_is_said_where_one_is_made(damaged, whole, tmp_path, config, by_verify):
    assert by_verify in every_command(damaged(config), whole, tmp_path)["verify"]


@pytest.mark.parametrize(
    ("change", "everywhere"),
    [
        (lambda t: {**t, MATRIX: t[MATRIX].to(torch.int8)}, "holds I8, where floating point is expected"),
        (lambda t: {**t, MATRIX: t[MATRIX].sum()}, "is [], but config.json says"),
        (lambda t: {**t, MATRIX: t[MATRIX][None]}, "is [1, 41, 48], but"),
        (lambda t: {**t, MATRIX: t[MATRIX][:0]}, "is [0, 48], but"),
        (lambda t: {**t, MATRIX: t[MATRIX].T}, "is [48, 41], but"),
        (lambda t: {**t, "module.x": t[MATRIX]}, "1 tensor that Llama's table does not know"),
        (lambda t: {k: v for k, v in t.items() if ".3." not in k}, "lacks 9 tensors of Llama"),
        (lambda t: {**t, "x\x1b[31m\a": torch.ones(1)}, r"first: x\x1b[31m\x07"),
    ],
)
def test_tensors_that_do_not_belong_are_refused_by_every_command(damaged, whole, tmp_path, change, everywhere):
    said = every_command(damaged(change=change), whole, tmp_path)
    assert all(everywhere in message and "\x1b" not in message for message in said.values()), said


def test_an_endless_name_makes_no_endless_message(damaged):
    src = damaged(change=lambda t: {**t, "x" * 100_000: torch.ones(1)})
    assert len(CliRunner().invoke(main, ["inspect", str(src)]).stderr) < 5000


@pytest.mark.parametrize("dtype", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F64"])
def test_every_floating_type_goes_through_every_command(damaged, whole, tmp_path, dtype):
    src = damaged(change=lambda t: {name: tensor.to(torch_dtype(dtype)) for name, tensor in t.items()})
    said = every_command(src, whole, tmp_path)
    assert not any(said.values()), said
    for name in set(COMMANDS) - {"inspect", "verify", "upcycle"}:
        assert {entry.dtype for entry in growth.open(tmp_path / name).values()} == {dtype}


def test_one_tensor_of_another_type_keeps_it(damaged, whole, tmp_path):
    src = damaged(change=lambda t: {**t, MATRIX: t[MATRIX].to(torch.float8_e4m3fn)})
    assert not any(every_command(src, whole, tmp_path).values())
    assert growth.open(tmp_path / "widen")[MATRIX].dtype == "F8_E4M3"


@pytest.mark.parametrize("dtype", sorted(FLOATS))
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_what_is_filled_in_without_torch_is_what_torch_writes(dtype, value):
    written = torch.tensor([value]).to(torch_dtype(dtype)).view(torch.uint8).numpy().tobytes()
    assert packed(value, dtype) == written


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_with_and_without_the_prefix_are_one_model(damaged, whole, tmp_path, prefix):
    src = damaged(change=lambda t: {name.replace("model.", prefix): tensor for name, tensor in t.items()})
    assert not any(every_command(src, whole, tmp_path).values())
    assert growth.verify(src, whole).max_abs == 0


# what is asked for


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("stack --factor 1000000", "4000000 layers would be made; at most 10000"),
        ("stack --factor 99999999999999", "at most 10000"),
        ("stack --order 0-99999999999", "layer 99999999999 is not there"),
        ("insert --layers 99999999", "at most 10000"),
        ("insert --after ,", "numbers with commas between them"),
        ("widen --hidden 99999999999", "at most 16777216"),
        ("widen --vocab 999999999999", "at most 16777216"),
        ("widen --vocab 60 --vocab-multiple 64", "give one of them"),
        ("widen --ffn 50 --noise nan", "from 0 to 100"),
        ("widen --ffn 50 --noise inf", "from 0 to 100"),
        ("widen --ffn 50 --noise -1", "from 0 to 100"),
        ("upcycle --experts 100000", "no more than 10000"),
        ("upcycle --noise nan", "no less than 0"),
        ("merge {src} --how slerp --weights 0,0", "sum to more than nothing"),
        ("cut --layers ,", "numbers with commas between them"),
        ("cut --ffn 0", "0 of ffn cannot be kept: at least 1"),
        ("cut --heads 0", "0 of heads cannot be kept"),
        ("cut --vocab -1", "-1 of vocab cannot be kept"),
    ],
)
@pytest.mark.timeout(30)
def test_what_cannot_be_asked_for_is_refused_at_once(whole, tmp_path, asked, said):
    command, *options = asked.split()
    first = [options.pop(0).format(src=whole)] if "{src}" in asked else []
    done = CliRunner().invoke(main, [command, *first, str(whole), str(tmp_path / "x"), *options])
    assert done.exit_code in (1, 2) and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_an_empty_list_of_places_is_refused(whole, tmp_path):
    with pytest.raises(UsageError, match="after which ones"):
        growth.insert(whole, tmp_path / "x", after=[])


# where it lies


def test_paths_that_are_no_text_work_to_the_lineage(whole, tmp_path):
    """Names of files are bytes on Linux; JSON has an escape for them."""
    src = shutil.copytree(whole, tmp_path / os.fsdecode(b"caf\xe9"))
    made = growth.stack(src, tmp_path / os.fsdecode(b"\xff"))
    assert growth.inspect(made).history[0]["sources"][0]["path"] == str(src)
    assert growth.open(growth.undo(made, tmp_path / "back")).digest() == growth.open(whole).digest()
    assert CliRunner().invoke(main, ["inspect", str(made)]).exit_code == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-"])
def test_a_closed_terminal_changes_nothing(whole, tmp_path, closed):
    command = f"{sys.executable} -c 'from growth.cli import main; main()'"
    for what in (f"stack {whole} {tmp_path / 'x'}", f"inspect {tmp_path / 'x'}"):
        done = subprocess.run(f"{command} {what} {closed}", shell=True, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert len(growth.open(tmp_path / "x")) > len(growth.open(whole))


@pytest.mark.parametrize(("umask", "directory", "file"), [(0o077, 0o700, 0o600), (0o002, 0o775, 0o664)])
def test_results_are_as_readable_as_the_umask_says(whole, tmp_path, umask, directory, file):
    before = os.umask(umask)
    try:
        for path in (growth.stack(whole, tmp_path / "a"), growth.widen(whole, tmp_path / "b", ffn=50)):
            assert path.stat().st_mode & 0o777 == directory
            assert {each.stat().st_mode & 0o777 for each in path.iterdir()} == {file}
    finally:
        os.umask(before)


@pytest.mark.parametrize("operator", ["stack", "widen"])
def test_a_limit_on_the_size_of_files_is_a_full_disk(whole, tmp_path, operator):
    """The copy in the kernel and the write of what was computed, both cut off in the middle."""
    asked = {"stack": "stack", "widen": "widen --ffn 50"}[operator].split()
    code = "from growth.cli import main; main()"
    shell = "ulimit -f 50; exec " + shlex.join([sys.executable, "-c", code, *asked, str(whole), str(tmp_path / "x")])
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 1 and "disk full while writing" in done.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []
