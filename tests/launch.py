"""Start a script as one process a rank, the way `distill run --ranks N` does, and read what each prints as JSON."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent


def launch(script: str, *arguments, ranks: int = 1, timeout: float = 250, check: bool = True, **environment) -> list:
    """The last line of stdout of every rank, parsed; a rank that fails fails the test with its stderr."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-W", "ignore", __file__, str(HERE / script), *map(str, arguments)]
        shared = os.environ | {
            "WORLD_SIZE": str(ranks),
            "DISTILL_STORE": f"{scratch}/store",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)]),
        }
        started = [
            subprocess.Popen(
                command,
                env=shared | environment | {"RANK": str(r), "LOCAL_RANK": str(r)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for r in range(ranks)
        ]
        try:
            ended = [(p, *p.communicate(timeout=timeout)) for p in started]
        finally:
            for p in started:
                p.kill()
    for p, _, err in ended:
        assert not check or p.returncode == 0, err[-3000:]
    return [json.loads(out.strip().splitlines()[-1]) if out.strip() else None for _, out, _ in ended]


if __name__ == "__main__":  # what every rank runs: the script, and the end that the command line has as well
    from distill import world

    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
    world.leave_at_once(SystemExit(0))
