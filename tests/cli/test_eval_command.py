"""`trimfit eval`."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
from cli_helpers import Outcome, trimfit

from trimfit import Score, load_checkpoint, score_text
from trimfit.cli import show

Here = Callable[..., Outcome]


@pytest.fixture(scope="module")
def expected(tiny: Path, text: Path) -> Score:
    checkpoint = load_checkpoint(str(tiny))
    documents = [text.read_text(encoding="utf-8")]
    return score_text(checkpoint.model, checkpoint.tokenizer, documents, length=32, limit_windows=5)


def test_json_is_what_the_library_computes(tiny: Path, text: Path, expected: Score) -> None:
    outcome = trimfit("eval", tiny, "--text", text, "--window", "32", "--limit", "5", "--json")
    assert outcome.status == 0
    assert outcome.stderr == ""
    assert json.loads(outcome.stdout) == {"text": str(text), **asdict(expected)}


def test_line_has_the_numbers(here: Here, tiny: Path, text: Path, expected: Score) -> None:
    outcome = here("eval", tiny, "--text", text, "--window", "32", "--limit", "5")
    assert outcome.status == 0
    assert outcome.stdout.count("\n") == 1
    for words in (
        f"perplexity {expected.perplexity:.4f}",
        f"{expected.bits_per_byte:.4f} bits/byte",
        f"{expected.tokens:,} tokens",
        f"{expected.bytes:,} bytes",
        "windows of 32",
        str(text),
    ):
        assert words in outcome.stdout


def test_window_is_capped_by_the_context(here: Here, tiny: Path, text: Path) -> None:
    outcome = here("eval", tiny, "--text", text, "--json")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert json.loads(outcome.stdout)["window"] == 64
    asked = here("eval", tiny, "--text", text, "--window", "65", "--json")
    assert json.loads(asked.stdout) == json.loads(outcome.stdout)
    assert asked.stderr.startswith("warning: ")


def test_json_lines(here: Here, tiny: Path, text: Path, tmp_path: Path, expected: Score) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"body": text.read_text(encoding="utf-8")}), encoding="utf-8")
    outcome = here("eval", tiny, "--text", lines, "--field", "body", "--window", "32", "--limit", "5", "--json")
    assert json.loads(outcome.stdout)["nats"] == expected.nats


def test_embedded_model_and_text(here: Here) -> None:
    outcome = here("eval", "demo", "--text", "demo", "--window", "256", "--limit", "2", "--json")
    assert outcome.status == 0, outcome.stderr
    printed = json.loads(outcome.stdout)
    assert printed["text"] == "demo"
    assert 1 < printed["perplexity"] < 200


def test_infinite_perplexity_is_null_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    score = Score(1e6, float("inf"), 9.0, tokens=10, bytes=40, window=8, documents=1)
    show.score(score, "text", as_json=True)
    assert json.loads(capsys.readouterr().out)["perplexity"] is None


def test_names_with_brackets_are_printed_as_they_are(here: Here, tiny: Path, tmp_path: Path) -> None:
    text = tmp_path / "[red]cats[/].txt".replace("/", ":")
    text.write_text("the cat sat on a mat")
    outcome = here("eval", tiny, "--text", text, "--window", "32")
    assert outcome.status == 0, outcome.stderr
    assert str(text) in outcome.stdout
