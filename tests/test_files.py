"""Laws of the ground floor: whole directories or none, readable JSON or a named error, one run per directory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from growth import console, files
from growth.errors import UsageError, UserError, did_you_mean

WRITER = """
import sys
from growth.files import committed
with committed(sys.argv[1], overwrite=True) as d:
    (d / "one").write_text("new")
    (d / "two").write_text("new")
"""
HOLDER = """
import sys
from growth.files import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def run(code, *args, **env):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=30,
    )


def content(directory):
    return {path.name: path.read_text() for path in directory.iterdir()}


def test_a_directory_appears_whole_and_readable_by_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        with files.committed(tmp_path / "deep" / "out") as d:
            (d / "sub").mkdir()
            (d / "sub" / "private").write_text("x")
            (d / "sub" / "private").chmod(0o600)  # what safetensors leaves
            assert not (tmp_path / "deep" / "out").exists()
    finally:
        os.umask(old)
    written = tmp_path / "deep" / "out" / "sub" / "private"
    assert written.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_failure_inside_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="mine"), files.committed(tmp_path / "out") as d:
        (d / "x").write_text("x")
        raise ValueError("mine")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_kept_unless_asked(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with pytest.raises(UserError, match="--overwrite"), files.committed(tmp_path / "out"):
        pass
    with files.committed(tmp_path / "out", overwrite=True) as d:
        (d / "new").write_text("new")
    assert content(tmp_path / "out") == {"new": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_overwriting_a_link_replaces_the_link_and_spares_its_target(tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "x").write_text("x")
    (tmp_path / "out").symlink_to(tmp_path / "precious")
    with files.committed(tmp_path / "out", overwrite=True) as d:
        (d / "new").write_text("new")
    assert content(tmp_path / "precious") == {"x": "x"}
    assert content(tmp_path / "out") == {"new": "new"} and not (tmp_path / "out").is_symlink()


def test_without_an_exchanging_rename_the_result_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda one, other: False)
    (tmp_path / "out").mkdir()
    with files.committed(tmp_path / "out", overwrite=True) as d:
        (d / "new").write_text("new")
    assert content(tmp_path / "out") == {"new": "new"}
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("point", ["commit.before_fsync", "commit.before_rename", "commit.after_rename"])
def test_a_kill_leaves_the_old_or_the_new_directory_and_the_next_run_sweeps(tmp_path, point):
    out = tmp_path / "out"
    out.mkdir()
    (out / "one").write_text("old")
    assert run(WRITER, out, FAULT=f"{point}:kill").returncode == -signal.SIGKILL
    new = {"one": "new", "two": "new"}
    assert content(out) == (new if point == "commit.after_rename" else {"one": "old"})
    assert len(list(tmp_path.iterdir())) == 2  # the leftover
    again = run(WRITER, out)
    assert again.returncode == 0 and "left behind" in again.stderr
    assert content(out) == new and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_living_writer_is_not_swept(tmp_path):
    with files.committed(tmp_path / "out") as d:
        (d / "mine").write_text("x")
        assert run(WRITER, tmp_path / "out").returncode == 0
        assert (d / "mine").exists()
        os.rename(tmp_path / "out", tmp_path / "other")


def test_a_full_disk_is_said_in_one_line_and_the_old_output_is_intact(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    monkeypatch.setenv("FAULT", "commit.before_rename:enospc")
    monkeypatch.setattr(files, "_passed", {})
    with (
        pytest.raises(UserError, match=r"disk full while writing .*out"),
        files.committed(tmp_path / "out", overwrite=True),
    ):
        pass
    assert content(tmp_path / "out") == {"old": "old"} and len(list(tmp_path.iterdir())) == 1


def test_space_is_checked_before_the_work(tmp_path):
    files.ensure_space(tmp_path / "not" / "yet", 1, "the copy")
    with pytest.raises(UserError, match=r"the copy needs 1000\.0 PB .* are free"):
        files.ensure_space(tmp_path, 10**18, "the copy")


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    files.write_json(path, {"ä": [1, 2.5, None]})
    monkeypatch.setattr(files, "_passed", {})
    monkeypatch.setenv("FAULT", "write.before_rename:raise:2")
    files.write_json(path, {"ä": 1})  # the first time passes
    with pytest.raises(RuntimeError, match="fault"):
        files.write_json(path, {"ä": 2})
    assert files.read_json(path) == {"ä": 1} and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "Expecting"),
        (b'{"a": 1, "a": 2}', "key 'a' stands twice"),
        (b'{"b": {"a": 1, "a": 2}}', "key 'a' stands twice"),
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"", "Expecting"),
    ],
)
def test_broken_json_is_refused_by_name(tmp_path, text, said):
    (tmp_path / "bad.json").write_bytes(text)
    with pytest.raises(UserError, match=said) as error:
        files.read_json(tmp_path / "bad.json")
    assert "bad.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.timeout(30)
def test_a_pipe_or_an_absent_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        files.read_json(tmp_path / "pipe")
    with pytest.raises(UserError, match="does not exist"):
        files.read_json(tmp_path / "absent")


def test_digests_follow_content_alone(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert files.sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.digest({"a": 1, "b": [2]}) == files.digest({"b": [2], "a": 1})
    assert files.digest({"a": 1}) != files.digest({"a": 2})


def test_a_second_run_is_refused_and_a_dead_one_forgotten(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"in use by process {holder.pid} on "), files.locked(tmp_path):
            pass
        holder.kill()
        holder.wait()
    assert (tmp_path / ".lock").exists()
    with files.locked(tmp_path):
        pass
    assert not (tmp_path / ".lock").exists()


@click.group(cls=console.Commands)
def commands():
    pass


@commands.command()
@click.argument("how")
def fail(how):
    raise {
        "user": UserError("no such layer"),
        "usage": UsageError("no such key"),
        "stop": KeyboardInterrupt(),
        "file": FileNotFoundError(2, "No such file or directory", "there"),
    }[how]


@pytest.mark.parametrize(
    ("how", "code", "said"),
    [("user", 1, "no such layer"), ("usage", 2, "no such key"), ("stop", 130, "interrupted"), ("file", 1, "there: No")],
)
def test_mistakes_are_one_line_and_an_exit_code(how, code, said):
    result = CliRunner().invoke(commands, ["fail", how])
    assert result.exit_code == code
    assert result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1


def test_the_nearest_known_word_is_offered():
    assert did_you_mean("relation_head", ["relation_heads", "lr"]) == "; did you mean 'relation_heads'?"
    assert did_you_mean("zzz", ["relation_heads"]) == ""


def test_figures_read_as_people_write_them():
    assert [console.size(n) for n in (0, 999, 1_400_000, 999_999_999)] == ["0 B", "999 B", "1.4 MB", "1.0 GB"]
    assert [console.count(n) for n in (7, 22_700_000)] == ["7", "22.7 M"]
    assert [console.seconds(s) for s in (0.25, 59.96, 200, 7500)] == ["0.2 s", "1 min 00 s", "3 min 20 s", "2 h 05 min"]


def test_bars_and_tables_are_plain_without_a_terminal_and_silent_on_other_ranks(capsys, monkeypatch):
    with console.bar(3, "writing") as advance:
        advance(2)
        advance(note="shard 2")
    console.table(["name", "n"], [["a[b]", 1], ["c", 22]])
    seen = capsys.readouterr()
    assert seen.err.startswith("writing: 3/3 in 0.0 s") and seen.err.endswith("shard 2\n")
    assert seen.out == "name  n\na[b]  1\nc     22\n"
    monkeypatch.setenv("RANK", "1")
    with console.bar(3, "writing") as advance:
        advance(3)
    console.say("x")
    assert capsys.readouterr().err == ""
