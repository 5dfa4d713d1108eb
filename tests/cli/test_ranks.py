"""Several processes share a run: the result is that of one, and one that dies ends them all, resumably."""

import json
import signal
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from cli_helpers import VOCABULARY, Outcome, environment, make_model, nothing_but, save_model, trimfit
from families import EXPERT_FAMILIES, FAMILIES
from safetensors.torch import load_file

PROGRAM = Path(__file__).with_name("forked_ranks.py")
TORCHRUN = Path(sysconfig.get_path("scripts")) / "torchrun"
OPTIONS = ("--samples", "20", "--sequence-length", "32", "--batch-size", "2")


class Ended(NamedTuple):
    """One of the processes."""

    status: int
    stdout: str
    stderr: str
    seconds: float


def run(count: int, *command: str | Path, victim: int = -1) -> list[Ended]:
    done = subprocess.run(
        [sys.executable, PROGRAM, str(count), str(victim), *command],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        check=True,
        timeout=240,
    )
    return [Ended(*ended) for ended in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With layers of several chunks of rows."""
    return save_model(tmp_path_factory.mktemp("models") / "wide", make_model(hidden=160, intermediate=176))


@pytest.fixture(scope="module")
def alone(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert trimfit("prune", model, "-o", out, "--calibration", text, *OPTIONS).status == 0
    return out


def assert_the_same(out: Path, alone: Path) -> None:
    """Rows are solved in the same chunks, wherever that is; sums of moments may differ where a rounding is close."""
    found, expected = load_file(out / "model.safetensors"), load_file(alone / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert torch.equal(found[name] == 0, weight == 0)
        torch.testing.assert_close(found[name], weight, rtol=1e-2, atol=1e-4)  # bfloat16
    records: list[dict[str, Any]] = [json.loads((d / "trimfit.json").read_text()) for d in (out, alone)]
    assert records[0]["fingerprints"] == records[1]["fingerprints"]
    assert records[0]["allocation"] == records[1]["allocation"]
    for mine, other in zip(records[0]["layers"], records[1]["layers"], strict=True):
        assert mine["accepted"] == other["accepted"]
        assert mine["final"]["calibration"] == pytest.approx(other["final"]["calibration"], rel=1e-4)


@pytest.mark.parametrize(("count", "options"), [(2, ("--offload",)), (4, ())])
def test_shared_by_several(
    model: Path, text: Path, tmp_path: Path, alone: Path, count: int, options: tuple[str, ...]
) -> None:
    """Of four, the windows held out are in two batches: two processes have none."""
    ended = run(count, "prune", model, "-o", tmp_path / "out", "--calibration", text, *OPTIONS, *options)
    assert [one.status for one in ended] == [0] * count, ended
    assert "written to" in ended[0].stdout
    assert all(one.stdout == "" for one in ended[1:])
    assert nothing_but(tmp_path, ["out"])
    assert_the_same(tmp_path / "out", alone)


@pytest.mark.parametrize(
    ("family", "options"), [("mixtral", ("--offload",)), ("llama", ("--pattern", "2:4", "--damping", "auto"))]
)
def test_experts_and_reordered_inputs_are_shared(
    text: Path, tmp_path: Path, family: str, options: tuple[str, ...]
) -> None:
    """With N:M a run is ended on its way, and two go on with what one has begun."""
    size = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    model = (FAMILIES | EXPERT_FAMILIES)[family].build(**size).bfloat16()
    command = ("prune", save_model(tmp_path / "model", model), "--calibration", text, *OPTIONS, *options)
    assert trimfit(*command, "-o", tmp_path / "alone").status == 0
    if family == "llama":
        ended = run(2, *command, "-o", tmp_path / "out", victim=1)
        assert ended[0].status == 1
    assert [one.status for one in run(2, *command, "-o", tmp_path / "out")] == [0, 0]
    assert_the_same(tmp_path / "out", tmp_path / "alone")


def test_torchrun(model: Path, text: Path, tmp_path: Path, alone: Path) -> None:
    command = ("prune", model, "-o", tmp_path / "out", "--calibration", text, *OPTIONS)
    done = subprocess.run(
        [TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "trimfit", *command],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to") == 1
    assert_the_same(tmp_path / "out", alone)


@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_dies_ends_all_and_others_go_on(
    model: Path, text: Path, tmp_path: Path, alone: Path, victim: int
) -> None:
    out = tmp_path / "out"
    ended = run(2, "prune", model, "-o", out, "--calibration", text, *OPTIONS, victim=victim)
    survivor = ended[1 - victim]
    assert ended[victim].status == -9
    assert survivor.status == 1
    assert survivor.seconds - ended[victim].seconds < 60
    message = survivor.stderr.strip().splitlines()[-1]
    assert message.startswith("error: another process of this run has ended or cannot be reached")
    assert message.isascii() and ".cc" not in message and "127.0.0.1" not in message  # what gloo says, behind --debug
    assert "Traceback" not in survivor.stderr
    assert nothing_but(tmp_path, ["out.run"])
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.run").glob("part-*.safetensors")}
    assert len(parts) > 2
    assert [one.status for one in run(3, "resume", out)] == [0, 0, 0]
    assert nothing_but(tmp_path, ["out"])
    assert_the_same(out, alone)


WAITING = """
import os, signal, time, torch
from trimfit import watch
from trimfit.ranks import joined

watch.GRACE = 1.0
with joined(torch.device("cpu")) as ranks:
    ranks.sum(torch.ones(1))
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(100)  # as if for a device, of which nothing comes back
"""


def test_one_that_waits_for_its_device_is_ended_too() -> None:
    """What NCCL does not raise; three of them, each of which watches one other."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        where = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "3"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING],
            env=environment() | where | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    said = [process.communicate(timeout=90)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, -signal.SIGKILL, 1]
    for rank in (0, 2):
        assert said[rank].splitlines()[-1].startswith("error: another process of this run has ended")


def test_wrong_input_is_said_once(model: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    ended = run(2, "prune", model, "-o", tmp_path / "out", "--calibration", text, *OPTIONS)
    assert [one.status for one in ended] == [2, 2]
    assert "out exists already" in ended[0].stderr
    assert ended[1].stderr == ""
    (tmp_path / "empty").mkdir()
    wrong = (
        ("prune", model, "--calibration", text, "--pattern", "3:7", *OPTIONS),
        ("quantize", tmp_path / "empty"),
    )
    for command in wrong:
        ended = run(2, *command, "-o", tmp_path / "new")
        assert [one.status for one in ended] == [2, 2]
        assert ended[0].stderr.count("error: ") == 1
        assert ended[1].stderr == ""


# Quantization


def assert_quantized_alike(out: Path, alone: Path) -> None:
    """Each row is rounded on its own, but products of fewer rows may sum otherwise, which decides where it is close."""
    assert {path.name for path in out.iterdir()} == {path.name for path in alone.iterdir()}
    found, expected = (load_file(next(directory.glob("*.safetensors"))) for directory in (out, alone))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] != tensor).float().mean() < 1e-2, name
    mine, other = (json.loads((d / "trimfit.json").read_text()) for d in (out, alone))
    assert mine["fingerprints"] == other["fingerprints"]
    assert (mine["refused"], mine["windows"]) == (other["refused"], other["windows"])
    for one, two in zip(mine["layers"], other["layers"], strict=True):
        assert (one["name"], one["transform"], one["tokens"]) == (two["name"], two["transform"], two["tokens"])
        assert one["weight_error"] == pytest.approx(two["weight_error"], rel=1e-3)


Here = Callable[..., Outcome]
ONLINE = ("--transform", "online", "--learned-steps", "2", "--calibration", "self", *OPTIONS)


@pytest.mark.parametrize(
    ("count", "options"), [(3, ()), (2, ONLINE)], ids=["without data", "with its own data, online"]
)
def test_quantization_is_shared(model: Path, tmp_path: Path, here: Here, count: int, options: tuple[str, ...]) -> None:
    command = ("quantize", model, "--bits", "3", *options)
    ended = run(count, *command, "-o", tmp_path / "out")
    assert [one.status for one in ended] == [0] * count, ended
    assert [one.stdout.count("written to") for one in ended] == [1] + [0] * (count - 1)
    assert here(*command, "-o", tmp_path / "alone").status == 0
    assert nothing_but(tmp_path, ["out", "alone"])
    assert_quantized_alike(tmp_path / "out", tmp_path / "alone")


def test_quantization_ends_with_one_that_dies_and_goes_on(model: Path, text: Path, tmp_path: Path, here: Here) -> None:
    command = ("quantize", model, "--format", "dense", "--calibration", text, *OPTIONS)
    ended = run(2, *command, "--offload", "-o", tmp_path / "out", victim=1)
    assert [one.status for one in ended] == [1, -9]
    message = ended[0].stderr.strip().splitlines()[-1]
    assert message.startswith("error: another process of this run has ended or cannot be reached")
    assert nothing_but(tmp_path, ["out.run"])
    assert (tmp_path / "out.run" / "part-00000.safetensors").is_file()
    assert [one.status for one in run(2, "resume", tmp_path / "out")] == [0, 0]
    assert here(*command, "-o", tmp_path / "alone").status == 0
    assert nothing_but(tmp_path, ["out", "alone"])
    assert_quantized_alike(tmp_path / "out", tmp_path / "alone")


@pytest.mark.parametrize("command", [("eval", "demo"), ("compare", "demo"), ("plan", "demo"), ("demo",)])
def test_what_is_not_shared_runs_in_one_process(
    command: tuple[str, ...], here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = here(*command)
    assert outcome.status == 2
    assert outcome.stderr == f"error: trimfit {command[0]} runs in one process: start it without torchrun\n"


def test_variables_of_schedulers(
    model: Path, text: Path, tmp_path: Path, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which tell a world without a place in it, or a place without an address."""
    command = ("prune", model, "--calibration", text, *OPTIONS, "--selector", "magnitude")
    for number, size in enumerate(("2", "", "many")):
        monkeypatch.setenv("WORLD_SIZE", size)
        assert here(*command, "-o", tmp_path / f"out-{number}").status == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    outcome = here(*command, "-o", tmp_path / "out")
    assert outcome.status == 2
    assert outcome.stderr.startswith("error: RANK and WORLD_SIZE say that this is one of several processes, but ")
    assert not (tmp_path / "out").exists()
