"""`trimfit eval --tasks`."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import Outcome, is_one_sentence

pytest.importorskip("lm_eval")

from trimfit.cli import show
from trimfit.evaluate import TaskScore
from trimfit.pipelines.evaluate_checkpoint import Evaluation

Here = Callable[..., Outcome]


def test_embedded_model_and_its_task(here: Here) -> None:
    printed = here("eval", "demo", "--tasks", "demo", "--limit", "4", "--json")
    assert (printed.status, printed.stderr) == (0, "")
    (task,) = json.loads(printed.stdout)["tasks"]
    assert (task["name"], task["metric"], task["examples"]) == ("demo", "acc_norm", 4)
    assert task["metrics"]["acc_norm"] == [task["value"], task["standard_error"]]


def test_text_and_tasks_together(here: Here, tiny: Path, text: Path) -> None:
    asked = f"continuation:{text}"
    options = ("--window", "32", "--limit", "2")
    both = here("eval", tiny, "--text", text, "--tasks", f" {asked} ,", *options, "--json")
    assert (both.status, both.stderr) == (0, "")
    alone = here("eval", tiny, "--text", text, *options, "--json")
    printed = json.loads(both.stdout)
    assert [task["name"] for task in printed.pop("tasks")] == [asked]
    assert printed == json.loads(alone.stdout)


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    scores = [
        TaskScore("arc_easy", "acc_norm", 0.75, 0.0125, 2376, {}),
        TaskScore("continuation:[red].txt", "acc", 0.5, None, 10, {}),
    ]
    show.evaluation(Evaluation(None, scores), None, as_json=False)
    _, _, first, second = capsys.readouterr().out.splitlines()
    assert re.split(r"\s{1,}", first.strip()) == ["arc_easy", "acc_norm", "0.7500", "0.0125", "2,376"]
    assert re.split(r"\s{1,}", second.strip()) == ["continuation:[red].txt", "acc", "0.5000", "–", "10"]


@pytest.mark.parametrize("options", [(), ("--tasks", " , ")])
def test_neither_text_nor_task(here: Here, tiny: Path, options: tuple[str, ...]) -> None:
    outcome = here("eval", tiny, *options)
    assert outcome.status == 2
    assert is_one_sentence(outcome)
    assert "--text" in outcome.stderr and "--tasks" in outcome.stderr


def test_missing_task_file(here: Here, tiny: Path) -> None:
    outcome = here("eval", tiny, "--tasks", "./missing.yaml")
    assert outcome.status == 2
    assert is_one_sentence(outcome)
    assert "./missing.yaml" in outcome.stderr
