"""Kills a command at random moments and goes on with it. A program of its own, for it forks.

    python killed_runs.py KILLS OUTPUT COMMAND…

Runs the command once undisturbed in OUTPUT-0, then again and again in OUTPUT-1, OUTPUT-2, …, each killed with SIGKILL
at a random moment and then resumed: KILLS times, and on until a fifth of KILLS met a run at work, for a short run may
be over by then. Prints a JSON list: for each kill the moment, whether anything was left to resume, and the exit status
of the end.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from trimfit.cli.main import run


def fork(arguments: list[str]) -> int:
    """The process of a command that finds all modules imported, and is silent."""
    child = os.fork()
    if child == 0:
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        os._exit(run(arguments))
    return child


def status(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    kills, output, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    saved = os.dup(1)
    os.dup2(2, 1)  # what the first run prints is no part of the answer
    assert run([*command, "-o", f"{output}-0"]) == 0  # in this process: all that it imports is there for the others
    os.dup2(saved, 1)
    start = time.perf_counter()
    assert status(fork([*command, "-o", f"{output}-0", "--overwrite"])) == 0
    duration = time.perf_counter() - start
    draw = random.Random(0)
    results: list[tuple[float, bool, int]] = []
    while len(results) < kills or sum(left for _, left, _ in results) <= kills / 5:
        assert len(results) < 10 * kills, "no run is killed while it is at work"
        out = f"{output}-{len(results) + 1}"
        moment = draw.uniform(0, duration)
        child = fork([*command, "-o", out])
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        killed = status(child) == -signal.SIGKILL
        left = Path(f"{out}.run", "run.json").is_file()
        if killed and not Path(out).exists():
            child = fork(["resume", out] if left else [*command, "-o", out])
            results.append((moment, left, status(child)))
        else:
            results.append((moment, left, status(fork(["resume", out]))))
    print(json.dumps(results))


main()
