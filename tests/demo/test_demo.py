"""`trimfit demo`: one run of the real command, and what it says."""

import json
import os
import subprocess
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from trimfit import InputError, PruneConfig, PruneReport, Score
from trimfit.cli import show
from trimfit.demo.run import NEW_TOKENS, PROMPT, DemoRow, run_demo
from trimfit.pipelines.observer import Silent

PAIRS = [("wanda", "50 %"), ("sparsegpt", "50 %"), ("wanda", "2:4"), ("sparsegpt", "2:4")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module")
def rows(out: Path) -> list[dict[str, Any]]:
    command = Path(sysconfig.get_path("scripts")) / "trimfit"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([command, "demo", "-o", out, "--json"], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    printed = json.loads(done.stdout)
    assert printed["output"] == str(out)
    return printed["rows"]


def pair(rows: list[dict[str, Any]], selector: str, pattern: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Mask only, refitted."""
    found = {row["refitted"]: row for row in rows if (row["selector"], row["pattern"]) == (selector, pattern)}
    return found[False], found[True]


def best_at_half(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return min(
        (pair(rows, selector, "50 %")[1] for selector in ("wanda", "sparsegpt")), key=lambda r: r["score"]["nats"]
    )


def test_dense_first_then_each_mask_alone_and_refitted(rows: list[dict[str, Any]]) -> None:
    dense, *pruned = rows
    assert (dense["selector"], dense["pattern"], dense["layer_error"]) == (None, None, None)
    expected = [(*case, refitted) for case in PAIRS for refitted in (False, True)]
    assert [(row["selector"], row["pattern"], row["refitted"]) for row in pruned] == expected
    assert len({(row["score"]["tokens"], row["score"]["window"]) for row in rows}) == 1


@pytest.mark.parametrize(("selector", "pattern"), PAIRS)
def test_refitted_is_better_than_mask_only(rows: list[dict[str, Any]], selector: str, pattern: str) -> None:
    masked, refitted = pair(rows, selector, pattern)
    assert rows[0]["score"]["perplexity"] < refitted["score"]["perplexity"] < masked["score"]["perplexity"]
    assert refitted["layer_error"]["held_out"] < masked["layer_error"]["held_out"]


@pytest.mark.parametrize(("selector", "pattern"), PAIRS)
def test_refitted_is_certified(rows: list[dict[str, Any]], selector: str, pattern: str) -> None:
    masked, refitted = pair(rows, selector, pattern)
    assert 0 <= refitted["certificate"] <= 1e-4
    assert refitted["steps"] >= 1
    assert masked["certificate"] is None


def test_models_continue_the_prompt(rows: list[dict[str, Any]]) -> None:
    assert all(row["sample"].strip() for row in rows)


def test_output_is_the_best_at_half_and_loads_with_plain_transformers(rows: list[dict[str, Any]], out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    assert tokenizer.decode(tokens[0, ids.shape[1] :]) == best_at_half(rows)["sample"]
    for name, weight in load_file(out / "model.safetensors").items():
        if "_proj" in name:
            assert int((weight == 0).sum()) >= weight.numel() // 2, name


def test_record_is_that_of_the_output(rows: list[dict[str, Any]], out: Path) -> None:
    record = json.loads((out / "trimfit.json").read_text(encoding="utf-8"))
    assert record["source"] == "demo"
    assert record["calibration"]["source"] == "demo"
    best = best_at_half(rows)
    assert record["config"]["selector"] == best["selector"]
    assert len(record["layers"]) == 6 * 7
    errors = [layer["final"]["held_out"] for layer in record["layers"]]
    assert sum(errors) / len(errors) == pytest.approx(best["layer_error"]["held_out"])
    assert max(layer["certificate"] for layer in record["layers"]) == best["certificate"]


def test_earlier_demo_is_replaced_but_no_other_directory(rows: list[dict[str, Any]], out: Path, tmp_path: Path) -> None:
    first = next(run_demo(out, Silent(), CPU))
    assert first.score.nats == pytest.approx(rows[0]["score"]["nats"], rel=1e-6)

    for name, record in {"empty": None, "broken": "{", "list": "[]", "pruned": '{"source": "my-model"}'}.items():
        (tmp_path / name).mkdir()
        if record is not None:
            (tmp_path / name / "trimfit.json").write_text(record)
        with pytest.raises(InputError, match="not from an earlier demo"):
            next(run_demo(tmp_path / name, Silent(), CPU))


@pytest.fixture
def shown(rows: list[dict[str, Any]], out: Path) -> list[DemoRow]:
    """The rows as the library gives them, all with the report of the output."""
    record = json.loads((out / "trimfit.json").read_text(encoding="utf-8"))
    report = PruneReport.model_validate({name: record[name] for name in PruneReport.model_fields})

    def row(given: dict[str, Any]) -> DemoRow:
        refit = "optimal" if given["refitted"] else "none"
        config = PruneConfig.model_validate({"selector": given["selector"] or "wanda", "refit": refit})
        return DemoRow(
            given["selector"],
            given["pattern"],
            Score(**given["score"]),
            None if given["selector"] is None else report.model_copy(update={"config": config}),
            given["seconds"],
            given["sample"],
        )

    return [row(given) for given in rows]


def test_table_fits_in_eighty_columns(
    shown: list[DemoRow], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show.demo(shown, Path("a place"), as_json=False)
    lines = capsys.readouterr().out.splitlines()
    header, table = lines[0], [line for line in lines if line.startswith(("dense ", "wanda ", "sparsegpt "))]
    assert header.split() == ["model", "pattern", "weights", "perplexity", "error", "certificate", "steps", "seconds"]
    assert len(table) == len(shown)
    assert "…" not in "".join(table)
    for line, row in zip(table, shown, strict=True):
        assert len(line) <= 80
        assert f" {row.score.perplexity:.3f} " in line
        assert ("refitted" in line) == row.refitted
        assert ("mask only" in line) == (row.report is not None and not row.refitted)
    assert any(line == "written to a place: AutoModelForCausalLM.from_pretrained('a place') loads it" for line in lines)
    assert sum(line.startswith(("prompt: ", "dense:  ", "pruned: ")) for line in lines) == 3
