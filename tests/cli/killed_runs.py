"""Kills a command at random moments and goes on with it. A program of its own, for it forks.

    python killed_runs.py KILLS OUTPUT COMMAND…

Runs the command once undisturbed in OUTPUT-0, then again and again in OUTPUT-1, OUTPUT-2, …, each killed with SIGKILL
at a random moment and then resumed: KILLS times, and on until a fifth of KILLS met a run at work, for a short run may
be over by then. Prints a JSON list: for each kill the moment, whether anything was left to resume, the exit status of
the end, and what all that was started for it had to say.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

from trimfit.cli.main import run


def fork(arguments: list[str], said: IO[bytes]) -> int:
    """The process of a command that finds all modules imported, and speaks into a file."""
    child = os.fork()
    if child == 0:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
        end = run(arguments)
        sys.stdout.flush()
        os._exit(end)
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
    with tempfile.TemporaryFile() as said:
        assert status(fork([*command, "-o", f"{output}-0", "--overwrite"], said)) == 0
    duration = time.perf_counter() - start
    draw = random.Random(0)
    results: list[tuple[float, bool, int, str]] = []
    while len(results) < kills or sum(left for _, left, _, _ in results) <= kills / 5:
        assert len(results) < 10 * kills, "no run is killed while it is at work"
        out = f"{output}-{len(results) + 1}"
        moment = draw.uniform(0, duration)
        with tempfile.TemporaryFile() as said:
            child = fork([*command, "-o", out], said)
            time.sleep(moment)
            os.kill(child, signal.SIGKILL)
            killed = status(child) == -signal.SIGKILL
            left = Path(f"{out}.run", "run.json").is_file()
            again = killed and not left and not Path(out).exists()
            end = status(fork([*command, "-o", out] if again else ["resume", out], said))
            said.seek(0)
            results.append((moment, left, end, said.read().decode()))
    print(json.dumps(results))


main()
