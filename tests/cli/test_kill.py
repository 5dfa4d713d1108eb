"""A run that is killed at any moment goes on, and ends as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import environment, make_model, nothing_but, save_model

PROGRAM = Path(__file__).with_name("killed_runs.py")


TEXT = ("--samples", "12", "--sequence-length", "32")
ITS_OWN = (*TEXT, "--calibration", "self")
GGUF = ("--symmetric", "--group-size", "32", "--format", "gguf")


@pytest.fixture
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of several blocks, in sizes that each format can hold."""
    return save_model(tmp_path_factory.mktemp("models") / "wide", make_model(intermediate=64))


@pytest.mark.parametrize(
    ("kills", "command"),
    [
        (25, ("prune", *TEXT, "--own-samples", "4")),
        (8, ("prune", *TEXT, "--offload", "--pattern", "2:4", "--memory-limit", "20kB")),
        (4, ("quantize", "--bits", "3")),
        (4, ("quantize", "--bits", "3", "--transform", "online", "--learned-steps", "2", *ITS_OWN)),
        (3, ("quantize", *GGUF)),
        (4, ("quantize", "--format", "dense", *TEXT, "--offload", "--memory-limit", "20kB")),
    ],
    ids=["in memory", "offloaded", "packed", "packed with its own data", "gguf", "dense and offloaded"],
)
def test_killed_and_resumed(model: Path, text: Path, tmp_path: Path, kills: int, command: tuple[str, ...]) -> None:
    name, *options = command
    data = ("--calibration", text) if "--samples" in options and "--calibration" not in options else ()
    command = (name, model, *data, *options)
    done = subprocess.run(
        [sys.executable, PROGRAM, str(kills), tmp_path / "out", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        check=True,
    )
    results = json.loads(done.stdout)
    assert len(results) >= kills
    assert kills / 5 < sum(left for _, left, _, _ in results)  # many are killed while they are at work
    assert [said for _, _, status, said in results if status != 0] == []
    assert nothing_but(tmp_path, [f"out-{i}" for i in range(len(results) + 1)])
    expected = files(tmp_path / "out-0")
    assert len(expected) >= (4 if "gguf" in command else 5)
    assert all(files(tmp_path / f"out-{i}") == expected for i in range(1, len(results) + 1))


def files(directory: Path) -> dict[str, bytes | dict[str, object]]:
    """All files; what is recorded, but for times, memory and the name of the run."""
    found: dict[str, bytes | dict[str, object]] = {path.name: path.read_bytes() for path in directory.iterdir()}
    record = json.loads((directory / "trimfit.json").read_text())
    for part in (record, *record["layers"]):
        for name in ("seconds", "stages", "peak_memory", "run"):
            part.pop(name, None)
    return {**found, "trimfit.json": record}
