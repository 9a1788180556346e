"""Who is taken for hanging, and who never: ranks without torch, that only say where they are."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest

from distill.watch import TICKS, Look

RANK = """
import contextlib, json, os, pathlib, signal, socket, subprocess, sys, threading, time
from distill import watch

rank, ranks, place = int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3])

def gathered(value):
    (place / f"{rank}.new").write_text(json.dumps(value))
    (place / f"{rank}.new").rename(place / f"{rank}.json")
    while len(list(place.glob("*.json"))) < ranks:
        time.sleep(0.01)
    return [json.loads((place / f"{r}.json").read_text()) for r in range(ranks)]

def collective():  # from outside: the main thread waits for another one, until all have come
    def come():
        while len(list(place.glob("*.came"))) < ranks:
            time.sleep(0.05)
        came.set()

    (place / f"{rank}.came").touch()
    came = threading.Event()
    threading.Thread(target=come).start()
    came.wait()

def later(work):
    threading.Timer(4, work).start()

last = rank == ranks - 1
with watch.over(rank, gathered, 1.8):
    watch.at("student, step 5")
    if last:
        BODY
    with watch.meeting() if sys.argv[4] == "meeting" else contextlib.nullcontext():
        collective()
"""
HANGS = {
    "sleeps": "time.sleep(600)",
    "waits for a lock": "threading.Event().wait()",
    "waits for a child": "subprocess.run(['sleep', '600'], capture_output=True)",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
    "draws a bar": "threading.Thread(target=lambda: [time.sleep(0.1) for _ in range(900)]).start(); time.sleep(600)",
}
WORKS = {
    "computes": "until = time.monotonic() + 4\n        while time.monotonic() < until: pass",
    "waits for a child that computes": "subprocess.run([sys.executable, '-c', 'while time.process_time() < 1.5: pass'"
    ".replace('while', 'import time\\nwhile')], capture_output=True)",
    "waits for the network": "a, b = socket.socketpair(); later(lambda: b.send(b'.')); a.recv(1)",
    "waits for who reads its output": "a, b = os.pipe(); later(lambda: os.read(a, 10**6)); os.write(b, b'.' * 70000)",
}
PARTS = {"hangs": HANGS["is stopped"], "works": WORKS["computes"]}  # in a part of a step where DeepSpeed waits


@pytest.fixture(scope="module")
def ended(tmp_path_factory) -> dict[str, list[tuple[int, str]]]:
    """Of every case, run at once: exit code and words of the rank that waits, and of the other one."""
    jobs = {case: _job(body, tmp_path_factory.mktemp("job"), "meeting") for case, body in (HANGS | WORKS).items()}
    jobs |= {case: _job(body, tmp_path_factory.mktemp("job"), "part") for case, body in PARTS.items()}
    try:
        return {case: [(p.wait(60), p.stderr.read()) for p in reversed(job)][::-1] for case, job in jobs.items()}
    finally:
        for p in (p for job in jobs.values() for p in job):
            p.kill()


def _job(body: str, place, waits_in: str) -> list[subprocess.Popen]:
    command = [sys.executable, "-c", RANK.replace("BODY", body)]
    pipe = {"stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, str(rank), "2", str(place), waits_in], **pipe) for rank in range(2)]


@pytest.mark.parametrize("case", [*HANGS, "hangs"])
def test_a_rank_that_does_nothing_is_named_and_ended_by_the_one_that_waits(ended, case):
    (code, said), (ended_by, silent) = ended[case]
    assert (code, ended_by, silent) == (1, -9, "")
    assert said.startswith("error: rank 1 (student, step 5) did nothing for 2 s and rank 0 waits, so the job ends here")


@pytest.mark.parametrize("case", [*WORKS, "works"])
def test_a_rank_that_is_at_work_is_waited_for(ended, case):
    assert ended[case] == [(0, ""), (0, "")]


@pytest.mark.parametrize(
    "used",
    [{"main": 3}, {"ticks": TICKS // 2}, {"bytes": 1_000_000}, {"family": frozenset({1, 2})}, {"asleep": False}],
)
def test_a_little_of_anything_is_work(used):
    then = Look(asleep=True, stopped=False, main=5, ticks=50, bytes=500, family=frozenset({1}))
    assert replace(then, ticks=51, bytes=600).idle_since(then, seconds=5)
    more = {name: getattr(then, name) + n if type(n) is int else n for name, n in used.items()}
    assert not replace(then, **more).idle_since(then, seconds=5)
