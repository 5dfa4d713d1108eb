"""A comparison against the same cells done by hand, and what it does with what it finds."""

import json
import math
import re
import statistics
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import FAMILIES, LENGTH, windows
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from trimfit import (
    CalibrationConfig,
    CompareConfig,
    Comparison,
    InputError,
    PruneConfig,
    RunError,
    compare,
    load_checkpoint,
    prune,
)
from trimfit.evaluate import TaskScore, score_text
from trimfit.pipelines.comparing import bench as compare_bench
from trimfit.pipelines.comparing import remembered
from trimfit.pipelines.comparing import report as comparison_report
from trimfit.pipelines.runs.journal import Journal

CONFIG = CompareConfig(selectors=("wanda",), updates=("none", "optimal"), sparsity=(0.5, 0.7), seeds=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, word_tokenizer: PreTrainedTokenizerFast) -> str:
    directory = tmp_path_factory.mktemp("models") / "llama"
    FAMILIES["llama"].build().save_pretrained(directory)
    word_tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokens.npy to calibrate on, text.txt to score."""
    directory = tmp_path_factory.mktemp("data")
    numpy.save(directory / "tokens.npy", windows(40).numpy())
    words = windows(1, 120, seed=7)[0].tolist()
    (directory / "text.txt").write_text(" ".join(f"w{i}" for i in words))
    return directory


def calibration(data: Path, seed: int = 0) -> CalibrationConfig:
    return CalibrationConfig(source=str(data / "tokens.npy"), samples=8, sequence_length=LENGTH, seed=seed)


def run(source: str, out: Path, data: Path, config: CompareConfig = CONFIG, **options: Any) -> Comparison:
    return compare(source, out, config, calibration(data), text=str(data / "text.txt"), window=LENGTH, **options)


@pytest.fixture(scope="module")
def done(source: str, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Comparison, Path]:
    """A finished comparison and its folder. Not to be written to."""
    out = tmp_path_factory.mktemp("runs") / "out"
    return run(source, out, data), out


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots take longer than all else here."""
    monkeypatch.setattr(comparison_report, "can_plot", lambda: False)


def lines(out: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (out / "journal.jsonl").read_text().splitlines()]
    for line in found:
        del line["crc32"]
    return found


def test_cells_are_those_pruned_and_scored_by_hand(source: str, data: Path, done: tuple[Comparison, Path]) -> None:
    comparison, _ = done
    text = (data / "text.txt").read_text()
    checkpoint = load_checkpoint(source)
    dense = score_text(checkpoint.model, checkpoint.tokenizer, [text], length=LENGTH)
    assert comparison.dense.score == dense
    assert len(comparison.rows) == 4
    for row in comparison.rows[1:3]:
        for seed, cell in enumerate(row.cells):
            fresh = load_checkpoint(source)
            drawn = calibration(data, seed).windows(fresh.tokenizer, fresh.model)
            report = prune(fresh.model, drawn, row.config)
            assert cell.seed == seed
            assert cell.score == score_text(fresh.model, fresh.tokenizer, [text], length=LENGTH)
            assert cell.report is not None
            assert cell.report.mean_error() == report.mean_error()


@pytest.mark.usefixtures("no_plots")
def test_several_sources_of_calibration_are_an_axis(source: str, data: Path, tmp_path: Path) -> None:
    """Beside real text what the model writes itself; each cell is what a comparison on that source alone has."""
    config = CompareConfig(selectors=("wanda",), updates=("none", "optimal"), seeds=2)
    real = calibration(data)
    both = [real, real.model_copy(update={"source": "self"})]
    text = {"text": str(data / "text.txt"), "window": LENGTH}
    found = compare(source, tmp_path / "both", config, both, **text)
    assert [(row.config.refit, row.calibration) for row in found.rows] == [
        (update, one.source) for update in ("none", "optimal") for one in both
    ]
    header, _, _, *rows = [[c.strip() for c in line.split("|")[1:-1]] for line in _tables(tmp_path / "both")[0]]
    assert header[:4] == ["pattern", "mask", "update", "calibration"]
    assert [row[3] for row in rows] == [real.source, "self"] * 2
    for one in both:
        alone = compare(source, tmp_path / one.source[-4:], config, one, **text)
        assert "calibration" not in _tables(tmp_path / one.source[-4:])[0][0]
        own = [row for row in found.rows if row.calibration == one.source]
        assert [[c.score for c in row.cells] for row in own] == [[c.score for c in row.cells] for row in alone.rows]
    scores = {row.calibration: row.cells[0].score for row in found.rows}
    assert scores[real.source] != scores["self"]
    before = lines(tmp_path / "both")
    compare(source, tmp_path / "both", config, both, **text)  # all of it is there
    assert lines(tmp_path / "both") == before


def test_sources_that_are_calibrated_on_otherwise_are_refused(source: str, data: Path, tmp_path: Path) -> None:
    one = calibration(data)
    for wrong, message in (
        ([], "no calibration is given"),
        ([one, calibration(data, 1)], "may differ in their source"),
    ):
        with pytest.raises(InputError, match=message):
            compare(source, tmp_path / "out", CONFIG, wrong)


def test_table_is_what_the_cells_say(done: tuple[Comparison, Path]) -> None:
    comparison, out = done
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _tables(out)[0]]
    header, _, dense, *rows = table
    assert header[:5] == ["pattern", "mask", "update", "perplexity", "excess nats"]
    score = comparison.dense.score
    assert score is not None
    assert dense[:5] == ["dense", "", "", f"{score.perplexity:.3f}", "0.0000"]
    for shown, row in zip(rows, comparison.rows, strict=True):
        found = [cell.score.perplexity for cell in row.cells if cell.score]
        assert shown[:3] == [
            f"{row.config.sparsity:.0%}",
            "wanda",
            {"none": "none"}.get(row.config.refit, "optimal refit"),
        ]
        assert shown[3] == f"{statistics.mean(found):.3f} ± {statistics.stdev(found):.3f}"
        excess = [math.log(p) - math.log(score.perplexity) for p in found]
        assert shown[4] == f"{statistics.mean(excess):.4f} ± {statistics.stdev(excess):.4f}"
        values = dict(zip(header, shown, strict=True))
        errors = [cell.report.mean_error().held_out or 0 for cell in row.cells if cell.report]
        assert values["layer error"] == f"{statistics.mean(errors):.4f} ± {statistics.stdev(errors):.4f}"
        assert values["zeros"] == f"{row.config.sparsity:.1%}"
        assert values["seeds"] == "2"
        assert (values["steps"] == "–") == (row.config.refit == "none")


def test_a_table_by_pattern_for_each_mask_and_update(done: tuple[Comparison, Path]) -> None:
    comparison, out = done
    _, perplexities, _ = _tables(out)
    assert next([c.strip() for c in line.split("|")[1:-1]][:4] for line in perplexities) == [
        "mask",
        "update",
        "50%",
        "70%",
    ]
    for row in comparison.rows:
        spread = row.spread(comparison.quantities["perplexity"])
        assert spread is not None
        assert any(f" {spread.text('.2f')} " in line and row.config.refit[:4] in line for line in perplexities)


def _tables(out: Path) -> list[list[str]]:
    parts = re.split(r"\n\n", (out / "comparison.md").read_text())
    return [part.splitlines() for part in parts if part.startswith("|")]


def test_json_has_every_number(done: tuple[Comparison, Path]) -> None:
    comparison, out = done
    record = json.loads((out / "comparison.json").read_text())
    assert record == json.loads(json.dumps(comparison.record()))
    for row, stored in zip(comparison.rows, record["rows"], strict=True):
        assert stored["config"]["sparsity"] == row.config.sparsity
        own = [cell["perplexity"] for cell in stored["cells"]]
        assert own == [cell.score.perplexity for cell in row.cells if cell.score]
        assert stored["perplexity"]["mean"] == pytest.approx(statistics.mean(own))


def test_plots_are_there(done: tuple[Comparison, Path]) -> None:
    _, out = done
    assert {path.name for path in out.glob("*.png")} == {
        "perplexity.png",
        *(f"layer-{quantity}-{pattern}.png" for quantity in ("error", "seconds") for pattern in ("50", "70")),
    }


@pytest.mark.usefixtures("no_plots")
def test_a_rerun_measures_only_what_is_new(
    source: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(source, tmp_path, data, CompareConfig(selectors=("wanda",), updates=("none",), seeds=1))
    before = (tmp_path / "journal.jsonl").read_bytes()
    pruned: list[tuple[str, float | None]] = []
    original = compare_bench.prune

    def counted(model: Any, tokens: Any, config: Any, **options: Any) -> Any:
        pruned.append((config.refit, config.sparsity))
        return original(model, tokens, config, **options)

    monkeypatch.setattr(compare_bench, "prune", counted)
    larger = CompareConfig(selectors=("wanda",), updates=("none", "optimal"), seeds=2)
    second = run(source, tmp_path, data, larger)
    assert pruned == [("optimal", 0.5), ("none", 0.5), ("optimal", 0.5)]
    assert (tmp_path / "journal.jsonl").read_bytes().startswith(before)
    assert second.rows[0].cells[0] == first.rows[0].cells[0]
    assert run(source, tmp_path, data, larger) == second
    assert len(pruned) == 3


@pytest.mark.usefixtures("no_plots")
def test_a_failed_cell_is_marked_and_tried_again(
    source: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, done: tuple[Comparison, Path]
) -> None:
    original = compare_bench.score_text
    calls: list[int] = []

    def failing(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:  # the dense model, the first cell, the second
            raise torch.OutOfMemoryError("CUDA out of memory\nand more")
        return original(*arguments, **options)

    monkeypatch.setattr(compare_bench, "score_text", failing)
    comparison = run(source, tmp_path, data)
    (failed,) = comparison.failures
    assert failed.failure == "OutOfMemoryError: CUDA out of memory"
    row = comparison.rows[1]
    assert (len(row.cells), row.failures) == (1, (failed,))
    text = (tmp_path / "comparison.md").read_text()
    assert "- Failed: 50%, wanda, optimal refit" in text and "seed 0: OutOfMemoryError: CUDA out of memory" in text
    assert "| 1 of 2 |" in text
    assert [r.cells for r in comparison.rows[2:]] == [r.cells for r in run(source, tmp_path, data).rows[2:]]

    again = run(source, tmp_path, data)
    assert again.failures == []
    expected, _ = done
    assert [[cell.score for cell in row.cells] for row in again.rows] == [
        [cell.score for cell in row.cells] for row in expected.rows
    ]


@pytest.mark.usefixtures("no_plots")
def test_a_row_without_a_single_cell(source: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise RunError("it cannot be done")

    monkeypatch.setattr(compare_bench, "prune", failing)
    config = CompareConfig(selectors=("wanda",), seeds=2)
    run(source, tmp_path, data, config)
    for plot in ("perplexity.png", "layer-error-50.png", "mine.png"):
        (tmp_path / plot).touch()
    comparison = run(source, tmp_path, data, config)
    assert [path.name for path in tmp_path.glob("*.png")] == ["mine.png"]  # there is nothing to draw now
    assert len(comparison.failures) == 4
    rows = [line for line in (tmp_path / "comparison.md").read_text().splitlines() if "| 0 of 2 |" in line]
    assert len(rows) == 2 and all("failed" in row for row in rows)


@pytest.mark.usefixtures("no_plots")
def test_layers_that_a_pattern_does_not_divide_stay_dense(source: str, data: Path, tmp_path: Path) -> None:
    config = CompareConfig(selectors=("wanda",), updates=("none",), patterns=("16:32", "2:5"), seeds=1)
    comparison = run(source, tmp_path, data, config)
    (row,) = comparison.rows
    report = row.cells[0].report
    assert report is not None
    assert len(report.layers) == 14
    assert all((record.sparsity == 0) == ("down_proj" in record.name) for record in report.layers)
    pruned, dense = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 48 * 32), 2 * 32 * 48
    zeros = row.spread(comparison.quantities["zeros"])
    assert zeros is not None and zeros.mean == pytest.approx(0.5 * pruned / (pruned + dense))
    text = (tmp_path / "comparison.md").read_text()
    assert "- 16:32: layers whose width 32 does not divide lose no weights: mlp.down_proj (2)." in text
    assert "- Left out: 2:5, as 5 divides the width of no layer to prune." in text

    divided = CompareConfig(patterns=("16:32",), common={"keep_dense": ("re:(q|k|v|o|gate|up)_proj",)})
    with pytest.raises(InputError, match="as 32 divides the width of no layer to prune"):
        run(source, tmp_path / "divided", data, divided)
    with pytest.raises(InputError, match="no layer can be pruned as asked: Left out: 2:5"):
        run(source, tmp_path / "other", data, CompareConfig(patterns=("2:5",)))


@pytest.mark.usefixtures("no_plots")
def test_targets_and_allocations_are_columns_where_they_differ(
    source: str, data: Path, tmp_path: Path, done: tuple[Comparison, Path]
) -> None:
    config = CompareConfig(
        selectors=("wanda",), updates=("optimal",), targets=("layer", "dense"), allocations=("uniform", "owl"), seeds=1
    )
    run(source, tmp_path, data, config)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _tables(tmp_path)[0]]
    assert table[0][2:5] == ["update", "target", "allocation"]
    assert [row[3:5] for row in table[3:]] == [[t, a] for t in ("layer", "dense") for a in ("uniform", "owl")]
    assert len({row[5] for row in table[3:]}) == 4  # four different perplexities
    assert "target" not in _tables(done[1])[0][0]


@pytest.mark.usefixtures("no_plots")
def test_defaults_of_the_selectors_are_told(source: str, data: Path, tmp_path: Path) -> None:
    common = {"updates": ("none",), "seeds": 1}
    run(source, tmp_path / "one", data, CompareConfig.model_validate({"selectors": ("joint",), **common}))
    assert "In all cells: target dense, scope layer, allocation error, rows attention, dense share 0.5," in (
        tmp_path / "one" / "comparison.md"
    ).read_text().replace("\n", " ")
    config = CompareConfig.model_validate({"selectors": ("wanda", "joint"), "patterns": ("2:4",), **common})
    run(source, tmp_path / "two", data, config)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _tables(tmp_path / "two")[0]]
    assert table[0][3] == "order" and [row[3] for row in table[3:]] == ["given", "reordered"]


@pytest.mark.usefixtures("no_plots")
def test_orders_of_inputs_are_a_column_where_several_are_asked(source: str, data: Path, tmp_path: Path) -> None:
    config = CompareConfig(selectors=("wanda",), updates=("none",), reorder=(True, False), patterns=("2:4",), seeds=1)
    run(source, tmp_path, data, config)
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _tables(tmp_path)[0]]
    assert table[0][3] == "order" and [row[3] for row in table[3:]] == ["reordered", "given"]
    assert table[3][4] != table[4][4]  # two perplexities


@pytest.mark.usefixtures("no_plots")
def test_what_cells_share_is_measured_once_and_changes_nothing(
    source: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pruned weights are those of each cell alone, to the last bit, and so they are when the run is cut in two."""
    states: list[dict[str, Tensor]] = []
    measured: list[str] = []
    score, plain = compare_bench.score_text, remembered.measure

    def scored(model: PreTrainedModel, *arguments: Any, **options: Any) -> Any:
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return score(model, *arguments, **options)

    def counted(*arguments: Any, **options: Any) -> Any:
        measured.append(options["method"])
        return plain(*arguments, **options)

    monkeypatch.setattr(compare_bench, "score_text", scored)
    monkeypatch.setattr(remembered, "measure", counted)
    config = CompareConfig(
        selectors=("wanda",),
        updates=("none",),
        allocations=("owl", "error"),
        sparsity=(0.5, 0.6),
        patterns=("2:4",),
        seeds=2,
    )
    whole = run(source, tmp_path / "whole", data, config)
    assert measured == ["owl", "error"] * 2  # once for each draw of the windows
    cells = [cell for seed in (0, 1) for row in whole.rows for cell in row.cells if cell.seed == seed]
    for cell, state in zip(cells, states[1:], strict=True):
        fresh = load_checkpoint(source)
        assert cell.config is not None and cell.seed is not None
        prune(fresh.model, calibration(data, cell.seed).windows(fresh.tokenizer, fresh.model), cell.config)
        assert all(torch.equal(tensor, state[name]) for name, tensor in fresh.model.state_dict().items())

    journal = (tmp_path / "whole" / "journal.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "journal.jsonl").write_bytes(b"".join(journal[:5]))  # what a kill after three cells leaves
    rest = states[4:]
    states.clear()
    cut = run(source, tmp_path / "cut", data, config)
    assert [[cell.score for cell in row.cells] for row in cut.rows] == [
        [c.score for c in row.cells] for row in whole.rows
    ]
    assert all(torch.equal(a[name], b[name]) for a, b in zip(states, rest, strict=True) for name in a)


def test_a_cell_is_told_the_time_that_it_would_have_taken_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = remembered.measure

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.05)
        return plain(*arguments, **options)

    monkeypatch.setattr(remembered, "measure", slow)
    measure, added, stages = remembered.Remembered(), [], []
    for options in ({"sparsity": 0.5}, {"sparsity": 0.6}, {"sparsity": 0.7}, {"pattern": "2:4"}):
        config = PruneConfig.model_validate({"selector": "sparsegpt", "refit": "own", **options})
        config = config.model_copy(update={"allocation": "owl"}) if config.pattern is None else config
        measure.begin()
        report = prune(FAMILIES["llama"].build(), windows(8), config, measure=measure)
        if config.sparsity == 0.7:
            continue  # as one that fails then
        told = measure.told(report)
        added.append(told.seconds - report.seconds)
        stages.append(told.stages)
    assert added[0] == added[2] == 0 and added[1] > 0.05  # the first has spent it itself, the last has no need of it
    assert stages[0].keys() == stages[1].keys()


@pytest.mark.parametrize("changed", ["model", "text", "calibration", "tasks"])
@pytest.mark.usefixtures("no_plots")
def test_a_journal_of_something_else_is_refused(
    source: str, data: Path, done: tuple[Comparison, Path], changed: str, tmp_path: Path, word_tokenizer: Any
) -> None:
    _, out = done
    before = (out / "journal.jsonl").read_bytes()
    options: dict[str, Any] = {}
    if changed == "model":
        source = str(tmp_path / "other")
        FAMILIES["llama"].build(seed=1).save_pretrained(source)
        word_tokenizer.save_pretrained(source)
    elif changed == "tasks":
        options["tasks"] = ["demo"]
    else:
        (tmp_path / "tokens.npy").write_bytes((data / "tokens.npy").read_bytes())
        (tmp_path / "text.txt").write_text((data / "text.txt").read_text() + (" w5" if changed == "text" else ""))
        if changed == "calibration":
            numpy.save(tmp_path / "tokens.npy", windows(40, seed=9).numpy())
        data = tmp_path
    with pytest.raises(InputError, match=rf"is of another run, which differs in .*{changed}"):
        run(source, out, data, **options)
    assert (out / "journal.jsonl").read_bytes() == before


@pytest.mark.usefixtures("no_plots")
def test_a_mistake_before_the_first_cell_does_not_bind_the_folder(source: str, data: Path, tmp_path: Path) -> None:
    config = CompareConfig(selectors=("wanda",), updates=("none",), seeds=1)
    with pytest.raises(InputError, match=r"missing\.txt"):
        run(source, tmp_path, data, config, tasks=["continuation:missing.txt"])
    comparison = run(source, tmp_path, data, config)
    assert run(source, tmp_path, data, config) == comparison  # from the journal


def test_cells_of_another_version_are_refused(
    source: str, data: Path, done: tuple[Comparison, Path], tmp_path: Path
) -> None:
    header, dense, cell, *_ = lines(done[1])
    del cell["report"]["layers"][0]["damping"]
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.open(header)
        journal.append(dense)
        journal.append(cell)
    with pytest.raises(InputError, match=r"are of another trimfit, from report\.layers\.0\.damping on"):
        run(source, tmp_path, data)


def test_other_things_are_never_written_over(source: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for out in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(InputError, match="choose another output"):
            run("there/is/no/such/model", out, data)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.usefixtures("no_plots")
def test_tasks_are_columns(source: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([(0.5, 0.0625), (0.25, 0.03125), (0.375, 0.09375)])  # the dense model, two seeds

    class Quiz:
        def __init__(self, names: list[str]):
            assert names == ["quiz"]

        def fingerprint(self) -> str:
            return "of the questions"

        def evaluate(self, model: Any, tokenizer: Any, *, limit: int, batch_size: int) -> list[TaskScore]:
            assert limit == 3
            value, error = next(values)
            return [TaskScore("quiz", "acc", value, error, 8, {"acc": (value, error)})]

    monkeypatch.setattr("trimfit.pipelines.comparing.compare.Tasks", Quiz)
    config = CompareConfig(selectors=("wanda",), updates=("none",), seeds=2)
    comparison = run(source, tmp_path, data, config, tasks=["quiz"], limit=3)
    text = (tmp_path / "comparison.md").read_text()
    assert "quiz (acc)" in text
    assert " 0.5000 ± 0.0625 " in text
    assert " 0.3125 ± 0.0625 " in text  # of examples, not of seeds
    assert "standard error over the examples asked, 8 of quiz." in text
    assert run(source, tmp_path, data, config, tasks=["quiz"], limit=3) == comparison  # from the journal


@pytest.mark.usefixtures("no_plots")
def test_other_questions_are_not_mixed_in(source: str, data: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    questions, words = tmp_path / "questions.txt", [f"w{i}" for i in windows(1, 600, seed=5)[0].tolist()]
    config = CompareConfig(selectors=("wanda",), updates=("none",), seeds=1)
    out, tasks = tmp_path / "out", [f"continuation:{questions}"]
    questions.write_text(" ".join(words))
    run(source, out, data, config, tasks=tasks, limit=4)
    before = (out / "journal.jsonl").read_bytes()
    questions.write_text(" ".join(reversed(words)))
    with pytest.raises(InputError, match=r"other .*tasks|tasks \(was"):
        run(source, out, data, config.model_copy(update={"seeds": 2}), tasks=tasks, limit=4)
    assert (out / "journal.jsonl").read_bytes() == before


def test_what_no_cell_can_do_is_refused_before_anything_is_written(source: str, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    auto = CONFIG.model_copy(update={"common": {"damping": "auto"}})
    for words, config, options in (
        ("of 1 windows is none", auto, {}),
        ("a limit of 0", CONFIG, {"limit": 0}),
        ("no task file or directory ./no.yaml", CONFIG, {"tasks": ["./no.yaml"]}),
    ):
        one = calibration(data).model_copy(update={"samples": 1})
        with pytest.raises(InputError, match=words):
            compare(source, out, config, one, text=str(data / "text.txt"), window=LENGTH, **options)
    assert not out.exists()


@pytest.mark.usefixtures("no_plots")
def test_a_method_has_one_line_across_shares_and_patterns(source: str, data: Path, tmp_path: Path) -> None:
    """Although an allocation and a scope mean nothing under N:M, and an order of inputs nothing elsewhere."""
    config = CompareConfig(selectors=("wanda", "joint"), updates=("none",), sparsity=(0.5,), patterns=("2:4",), seeds=1)
    run(source, tmp_path, data, config)
    pivot = [[cell.strip() for cell in line.split("|")[1:-1]] for line in _tables(tmp_path)[1]]
    assert pivot[0][-2:] == ["50%", "2:4"]
    assert [line[0] for line in pivot[2:]] == ["wanda", "joint"]
    assert all(line[-2] and line[-1] for line in pivot[2:])


@pytest.mark.usefixtures("no_plots")
def test_an_infinite_perplexity_survives_the_journal(
    source: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = compare_bench.score_text

    def huge(*arguments: Any, **options: Any) -> Any:
        from dataclasses import replace

        return replace(original(*arguments, **options), nats=1000.0, perplexity=math.inf)

    monkeypatch.setattr(compare_bench, "score_text", huge)
    config = CompareConfig(selectors=("wanda",), updates=("none",), seeds=1)
    comparison = run(source, tmp_path, data, config)
    again = run(source, tmp_path, data, config)
    assert again == comparison
    assert again.rows[0].cells[0].score == comparison.rows[0].cells[0].score
    record = json.loads((tmp_path / "comparison.json").read_text(), parse_constant=pytest.fail)
    assert record["rows"][0]["perplexity"]["mean"] is None
