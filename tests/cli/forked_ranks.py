"""Runs a command in several processes, as torchrun does, but forks them: their imports are done once.

    python forked_ranks.py COUNT VICTIM COMMAND…

Each process is told its rank and how many there are. With VICTIM ≥ 0 the process of this rank kills itself when it
has given its share of 40 tensors: four for each refit of `prune`, three for each layer of `quantize`. Prints a JSON
list of [exit status, standard output, standard error, seconds].
"""

import importlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from typing import IO, Any

from trimfit.cli.main import run

importlib.import_module("trimfit.pipelines")
importlib.import_module("transformers.models.llama.modeling_llama")


def die_in_the_middle() -> None:
    from trimfit.ranks import Ranks

    plain, calls = Ranks.gather, [0]

    def gather(self: Ranks, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] > 40:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *given)

    Ranks.gather = gather


def fork(rank: int, victim: int, command: list[str], files: list[IO[Any]]) -> int:
    child = os.fork()
    if child == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        for number, file in zip((1, 2), files, strict=True):
            os.dup2(file.fileno(), number)
        if rank == victim:
            die_in_the_middle()
        status = run(command)
        sys.stdout.flush()
        os._exit(status)
    return child


def _file() -> IO[Any]:
    return tempfile.TemporaryFile("w+")


def main() -> None:
    count, victim, command = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ |= {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    files = [[_file(), _file()] for _ in range(count)]
    start = time.perf_counter()
    ranks = {fork(rank, victim, command, files[rank]): rank for rank in range(count)}
    ended: dict[int, tuple[int, float]] = {}
    while len(ended) < count:
        child, status = os.wait()
        ended[ranks[child]] = os.waitstatus_to_exitcode(status), time.perf_counter() - start
    results: list[list[Any]] = []
    for rank in range(count):
        texts: list[str] = []
        for file in files[rank]:
            file.seek(0)
            texts.append(file.read())
        results.append([ended[rank][0], *texts, ended[rank][1]])
    print(json.dumps(results))


main()
