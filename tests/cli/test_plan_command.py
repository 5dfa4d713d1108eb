"""`trimfit plan`: the options of prune, the numbers of the model, exit 2 for what cannot fit. No weight is read."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_helpers import CONTEXT, Outcome, is_one_sentence, make_model

from trimfit.cli import commands, plan
from trimfit.pipelines import plan as planning
from trimfit.pipelines.plan import Capacity
from trimfit.throughput import Throughput

RATES = Throughput(model=1e9, float32=1e9, float64=1e9, memory=1e9, calls=1e5, disk=1e9)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "measure_throughput", lambda *arguments: RATES)


def test_takes_the_options_of_prune():
    prune, planned = (inspect.signature(command).parameters for command in (commands.prune, plan.plan))
    assert planned.keys() == prune.keys() - {"plan"}
    for name, parameter in planned.items():
        if name != "output":
            assert parameter.default == prune[name].default


def test_numbers_are_those_of_the_model(here: Callable[..., Outcome], tiny: Path):
    outcome = here("plan", tiny, "--samples", "16", "--selector", "wanda", "--json")
    assert outcome.status == 0 and outcome.stderr == ""
    found = json.loads(outcome.stdout)
    model = make_model()
    layers = [p for name, p in model.named_parameters() if name.endswith("proj.weight")]
    assert (found["blocks"], found["layers"]) == (2, 14)
    assert found["weights"] == sum(p.numel() for p in layers)
    assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert found["model_bytes"] == sum(p.nbytes for p in model.parameters())  # bfloat16, told by the files
    assert (found["windows"], found["window_length"]) == (16, CONTEXT)
    assert found["problem"] is None and set(found["seconds"]) >= {"forward", "gram", "mask", "refit"}


def test_weights_need_not_be_there(here: Callable[..., Outcome], tiny: Path, tmp_path: Path):
    shutil.copy(tiny / "config.json", tmp_path)
    whole, bare = (here("plan", source, "--offload", "--pattern", "2:4") for source in (tiny, tmp_path))
    assert whole.status == bare.status == 0
    assert "14 layers in 2 blocks" in bare.stdout and "one block at a time" in bare.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_what_cannot_fit_is_refused(here: Callable[..., Outcome], tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "capacity", lambda *arguments: Capacity(2**40, None, 2**12, 0))
    outcome = here("plan", tiny)
    assert outcome.status == 2 and is_one_sentence(outcome)
    assert "of disk space" in outcome.stderr and "14 layers" in outcome.stdout


@pytest.mark.parametrize("output", ["missing/out", "there", "theirs", "file", "a" * 210])
@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_output_is_refused_by_the_sentence_of_prune(
    here: Callable[..., Outcome], tiny: Path, tmp_path: Path, output: str, options: tuple[str, ...]
):
    """`there` has a trimfit.json, so that prune may overwrite it, but a file is in the way of its run directory."""
    for folder in ("there", "theirs"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").touch()
    (tmp_path / "there" / "trimfit.json").touch()
    (tmp_path / "there.run").touch()
    (tmp_path / "file").touch()
    planned, pruned = (here(command, tiny, "-o", tmp_path / output, *options) for command in ("plan", "prune"))
    assert planned.status == pruned.status == 2 and is_one_sentence(planned)
    assert planned.stderr == pruned.stderr and planned.stdout == ""


def test_output_that_can_be_written_is_planned(here: Callable[..., Outcome], tiny: Path, tmp_path: Path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "trimfit.json").touch()
    for output in ("new", "old"):
        assert here("plan", tiny, "-o", tmp_path / output, "--overwrite").status == 0
    assert here("plan", tiny, "-o", tiny, "--overwrite").stderr == here("prune", tiny, "-o", tiny, "--overwrite").stderr


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--sparsity", "2"), "--sparsity"),
        (("--offload", "--calibration", "self"), "leave out --offload"),
        (("--memory-limit", "much"), "--memory-limit"),
        (("--memory-limit", "8"), "--memory-limit takes a size such as 8GiB"),
    ],
)
def test_what_prune_refuses_plan_refuses(
    here: Callable[..., Outcome], tiny: Path, options: tuple[str, ...], expected: str
):
    outcome = here("plan", tiny, *options)
    assert outcome.status == 2 and is_one_sentence(outcome) and expected in outcome.stderr
