"""A run that is killed at any moment goes on, and ends as if nothing had happened."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import environment, nothing_but

PROGRAM = Path(__file__).with_name("killed_runs.py")


@pytest.mark.parametrize(
    ("kills", "options"),
    [(25, ("--calibration", "self")), (8, ("--offload", "--pattern", "2:4", "--memory-limit", "20kB"))],
    ids=["in memory", "offloaded"],
)
def test_killed_and_resumed(tiny: Path, text: Path, tmp_path: Path, kills: int, options: tuple[str, ...]) -> None:
    data = () if "--calibration" in options else ("--calibration", text)
    command = ("prune", tiny, *data, "--samples", "12", "--sequence-length", "32", *options)
    done = subprocess.run(
        [sys.executable, PROGRAM, str(kills), tmp_path / "out", *command],
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
        check=True,
    )
    results = json.loads(done.stdout)
    assert [status for _, _, status in results] == [0] * kills
    assert kills / 5 < sum(left for _, left, _ in results)  # many are killed while they are at work
    assert nothing_but(tmp_path, [f"out-{i}" for i in range(kills + 1)])
    expected = files(tmp_path / "out-0")
    assert len(expected) > 4
    assert all(files(tmp_path / f"out-{i}") == expected for i in range(1, kills + 1))


def files(directory: Path) -> dict[str, bytes | dict[str, object]]:
    """All files; what is recorded, but for times, memory and the name of the run."""
    found: dict[str, bytes | dict[str, object]] = {path.name: path.read_bytes() for path in directory.iterdir()}
    record = json.loads((directory / "trimfit.json").read_text())
    for part in (record, *record["layers"]):
        for name in ("seconds", "stages", "peak_memory", "run"):
            part.pop(name, None)
    return {**found, "trimfit.json": record}
