"""`trimfit compare`: what it prints and writes, and that nothing ends it for good."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import COMMAND, Outcome, environment, is_one_sentence

from trimfit.pipelines.comparing import bench as compare_bench
from trimfit.pipelines.comparing import report as comparison_report

Here = Callable[..., Outcome]
PATIENCE = 240.0


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than all else here."""
    monkeypatch.setattr(comparison_report, "can_plot", lambda: False)


@pytest.fixture
def arguments(tiny: Path, text: Path, tmp_path: Path) -> list[str | Path]:
    """A small comparison."""
    data = ("--calibration", text, "--text", text, "--samples", "8", "--sequence-length", "32", "--window", "32")
    return ["compare", tiny, "-o", tmp_path / "out", *data, "--limit", "2", "--selectors", "wanda"]


def cells(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()][2:]


def test_table_on_standard_output_and_in_the_folder(here: Here, arguments: list[str | Path], tmp_path: Path) -> None:
    outcome = here(
        *arguments, "--updates", "none, own", "--updates", "optimal", "--sparsity", "0.5,0.7", "--seeds", "2"
    )
    assert outcome.status == 0
    assert outcome.stderr.splitlines() == [
        'warning: no plots were drawn, as matplotlib is missing: pip install "trimfit[report]"'
    ]
    table = [line for line in outcome.stdout.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 1 + 4
    assert "\n".join(table) in (tmp_path / "out" / "comparison.md").read_text()
    assert "wanda has no weight update of its own" in outcome.stdout
    assert outcome.stdout.splitlines()[-1].startswith(f"written to {tmp_path / 'out'}")
    assert [(c["config"]["sparsity"], c["config"]["refit"], c["seed"]) for c in cells(tmp_path / "out")] == [
        (sparsity, update, seed) for seed in (0, 1) for sparsity in (0.5, 0.7) for update in ("none", "optimal")
    ]


def test_real_text_beside_what_the_model_writes(
    here: Here, arguments: list[str | Path], text: Path, tmp_path: Path
) -> None:
    place = arguments.index("--calibration") + 1
    arguments[place] = f"{text},self"
    outcome = here(*arguments, "--updates", "none", "--seeds", "1")
    assert outcome.status == 0, outcome.stderr
    assert [cell["calibration"] for cell in cells(tmp_path / "out")] == [str(text), "self"]
    comma = tmp_path / "a,b.txt"
    comma.write_text(text.read_text())
    arguments[place] = comma
    assert here(*arguments, "--updates", "none", "--seeds", "1", "-o", tmp_path / "more").status == 0
    assert [cell["calibration"] for cell in cells(tmp_path / "more")] == [str(comma)]


def test_json(here: Here, arguments: list[str | Path], tmp_path: Path) -> None:
    options = ("--patterns", "2:4", "--reorder", "no,yes", "--damping", "0.1")
    outcome = here(*arguments, "--updates", "none", *options, "--seeds", "1", "--json")
    assert outcome.status == 0
    printed = json.loads(outcome.stdout)
    assert printed.pop("output") == str(tmp_path / "out")
    assert printed == json.loads((tmp_path / "out" / "comparison.json").read_text())
    rows = [tuple(r["config"][name] for name in ("pattern", "reorder", "damping")) for r in printed["rows"]]
    assert rows == [("2:4", False, 0.1), ("2:4", True, 0.1)]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--selectors", "wandaa"), "selectors: unknown selector 'wandaa': choose one of"),
        (("--updates", "best"), "updates: input should be 'optimal', 'own' or 'none', but it is 'best'"),
        (("--sparsity", "0.5,2:4"), "--sparsity takes numbers such as 0.5,0.6, but it is '0.5,2:4'; N:M goes to"),
        (("--sparsity", "50"), "sparsity: input should be less than 1"),
        (("--patterns", "24"), "cannot read the pattern '24'"),
        (("--reorder", "maybe"), "--reorder takes yes, no or both as yes,no, but it is 'maybe'"),
        (("--updates", "own"), "no combination of the axes exists"),
        (("--updates", " ,"), "--updates names nothing; name some, or leave it out"),
        (("--limit", "0"), "a limit of 0"),
        (("--tasks", "./no.yaml"), "no task file or directory ./no.yaml"),
        (("--samples", "1", "--damping", "auto"), "a share of 0.125 of 1 windows is none"),
        (("--seeds", "0"), "--seeds: input should be greater than or equal to 1"),
        (("--ignore", "nothing"), "'nothing' matches no linear layer"),
        (("--keep-dense", "nothing"), "the keep-dense pattern 'nothing' matches no linear layer"),
        (("--text", "no-such.txt"), "no such file: no-such.txt"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(
    here: Here, arguments: list[str | Path], tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    outcome = here(*arguments, *options)
    assert outcome.status == 2
    assert is_one_sentence(outcome), outcome.stderr
    assert said in " ".join(outcome.stderr.split())
    assert not (tmp_path / "out").exists()


def test_failed_cells_are_told_at_once_and_at_the_end(
    here: Here, arguments: list[str | Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compare_bench.prune

    def failing(model: Any, tokens: Any, config: Any, **options: Any) -> Any:
        if config.refit == "none":
            raise RuntimeError("no such luck")
        return original(model, tokens, config, **options)

    monkeypatch.setattr(compare_bench, "prune", failing)
    outcome = here(*arguments, "--seeds", "1")
    assert outcome.status == 1
    first, *_, last = outcome.stderr.splitlines()
    assert first == "warning: wanda, none, 50%, seed 0: RuntimeError: no such luck"
    assert last.startswith("error: 1 of 2 cells failed")
    assert any(cell.strip() == "failed" for cell in outcome.stdout.split("|"))


def test_sigterm_leaves_no_lock_and_no_failed_cell(
    here: Here, arguments: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compare_bench.prune

    def terminated(model: Any, tokens: Any, config: Any, **options: Any) -> Any:
        raise SystemExit(128 + signal.SIGTERM)  # what the command's handler does

    monkeypatch.setattr(compare_bench, "prune", terminated)
    assert here(*arguments, "--seeds", "1").status == 128 + signal.SIGTERM
    assert cells(tmp_path / "out") == []
    monkeypatch.setattr(compare_bench, "prune", original)
    assert here(*arguments, "--seeds", "1").status == 0


def test_ctrl_c_keeps_what_is_finished(
    here: Here, arguments: list[str | Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compare_bench.prune

    def interrupted(model: Any, tokens: Any, config: Any, **options: Any) -> Any:
        if config.refit == "optimal":
            raise KeyboardInterrupt
        return original(model, tokens, config, **options)

    monkeypatch.setattr(compare_bench, "prune", interrupted)
    outcome = here(*arguments, "--seeds", "1")
    assert outcome.status == 130
    assert outcome.stderr.splitlines()[-1] == (
        f"error: interrupted; what was finished is in {tmp_path / 'out'}: the same command goes on from there"
    )
    assert len(cells(tmp_path / "out")) == 1


def test_a_killed_process_is_continued(here: Here, arguments: list[str | Path], tmp_path: Path) -> None:
    many = [*arguments, "--updates", "none"]  # cells of the first process: far more than it gets to
    with open(tmp_path / "stderr", "w") as stderr:
        process = subprocess.Popen([COMMAND, *many, "--seeds", "1000"], env=environment(), stderr=stderr)
    journal, end = tmp_path / "out" / "journal.jsonl", time.monotonic() + PATIENCE
    try:
        while not (journal.exists() and journal.read_bytes().count(b"\n") >= 4):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "stderr").read_text()
            time.sleep(0.02)
        process.kill()
        assert process.wait(PATIENCE) == -signal.SIGKILL
    finally:
        process.kill()
    kept = journal.read_bytes()
    whole = kept[: kept.rfind(b"\n") + 1]
    finished = whole.count(b"\n") - 2
    assert 2 <= finished < 1000

    wanted = str(finished + 2)
    outcome = here(*many, "--seeds", wanted)
    assert outcome.status == 0, outcome.stderr
    assert journal.read_bytes().startswith(whole)
    assert len(cells(tmp_path / "out")) == finished + 2

    fresh = tmp_path / "fresh"
    os.rename(tmp_path / "out", tmp_path / "resumed")
    assert here(*many, "--seeds", wanted).status == 0
    os.rename(tmp_path / "out", fresh)
    scores = [[cell["score"] for cell in cells(tmp_path / name)] for name in ("resumed", "fresh")]
    assert scores[0] == scores[1]
