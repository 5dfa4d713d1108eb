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

RATES = Throughput(model=1e9, float32=1e9, float64=1e9, memory=1e9, disk=1e9)


@pytest.fixture(autouse=True)
def known_machine(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "measure_throughput", lambda *arguments: RATES)


def test_takes_the_options_of_prune():
    prune, planned = (inspect.signature(command).parameters for command in (commands.prune, plan.plan))
    assert planned.keys() == prune.keys() - {"overwrite"}
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
