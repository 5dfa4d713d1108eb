"""`trimfit plan` and --plan: numbers of the model, exit 2 for what cannot fit. No weight is read, nothing written."""

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli_helpers import CONTEXT, VOCABULARY, Outcome, is_one_sentence, make_model, nothing_but, save_model
from families import EXPERT_FAMILIES, FAMILIES

from trimfit.cli import commands, plan
from trimfit.pipelines.planning import plan as planning
from trimfit.pipelines.planning.plan import Capacity
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
    assert "so small a model takes several times as long" in bare.stdout and "writing" not in bare.stdout
    assert "not counted: writing 5 windows" in here("plan", tiny, "--own-samples", "5").stdout
    assert "14 layers in 2 blocks" in bare.stdout and "one block at a time" in bare.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json"]


def test_what_cannot_fit_is_refused(here: Callable[..., Outcome], tiny: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "capacity", lambda *arguments: Capacity(2**40, None, 2**12, 0))
    outcome = here("plan", tiny)
    assert outcome.status == 2 and is_one_sentence(outcome)
    assert "of disk space but there are 4.0 KiB" in outcome.stderr and "14 layers" in outcome.stdout


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
        (("--keep-dense", "nothing"), "the keep-dense pattern 'nothing' matches no linear layer"),
        (("--pattern", "2:5"), "inputs cannot be split into groups of 5"),
        (("--memory-limit", "much"), "--memory-limit"),
        (("--memory-limit", "8"), "--memory-limit takes a size such as 8GiB"),
    ],
)
def test_what_prune_refuses_plan_refuses(
    here: Callable[..., Outcome], tiny: Path, options: tuple[str, ...], expected: str
):
    outcome = here("plan", tiny, *options)
    assert outcome.status == 2 and is_one_sentence(outcome) and expected in outcome.stderr


@pytest.mark.parametrize("command", ["prune", "quantize"])
def test_the_command_itself_plans(here: Callable[..., Outcome], tiny: Path, tmp_path: Path, command: str):
    outcome = here(command, tiny, "-o", tmp_path / "out", "--plan")
    assert outcome.status == 0 and "14 layers in 2 blocks" in outcome.stdout
    assert nothing_but(tmp_path)
    told = [here(*words, "-o", tmp_path / "no" / "out") for words in ((command, tiny, "--plan"), (command, tiny))]
    assert told[0] == told[1] and is_one_sentence(told[0])


def test_prune_plans_as_plan_does(here: Callable[..., Outcome], tiny: Path, tmp_path: Path):
    options = (tiny, "-o", tmp_path / "out", "--samples", "8", "--json")
    own, apart = (json.loads(here(*words).stdout) for words in (("prune", *options, "--plan"), ("plan", *options)))
    assert {**own, "peaks": 0, "disk_free": 0} == {**apart, "peaks": 0, "disk_free": 0}


def test_quantize_plans_what_was_asked(here: Callable[..., Outcome], tiny: Path, tmp_path: Path):
    """Packed without data is made block by block by itself; with data, or dense, it is not."""

    def planned(*options: str) -> dict[str, Any]:
        return json.loads(here("quantize", tiny, "-o", tmp_path / "out", "--plan", "--json", *options).stdout)

    packed, dense, seen = planned(), planned("--format", "dense"), planned("--calibration", "demo", "--samples", "16")
    assert [one["offload"] for one in (packed, dense, seen)] == [True, False, False]
    assert [one["windows"] for one in (packed, dense, seen)] == [0, 0, 16]
    assert "forward" in seen["seconds"] and "forward" not in packed["seconds"]
    assert seen["disk"] < packed["disk"] != dense["disk"]  # without data moments are kept
    assert "no data" in here("quantize", tiny, "-o", tmp_path / "out", "--plan").stdout


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--bits", "9"), "--bits"),
        (("--format", "gguf", "--symmetric", "--offload"), "leave out --offload"),
        (("--calibration", "self", "--offload"), "leave out --offload"),
        (("--ignore", "*"), "the ignore patterns leave no layer"),
    ],
)
def test_what_quantize_refuses_its_plan_refuses(
    here: Callable[..., Outcome], tiny: Path, tmp_path: Path, options: tuple[str, ...], expected: str
):
    command = ("quantize", tiny, "-o", tmp_path / "out", *options)
    planned, run = here(*command, "--plan"), here(*command)
    assert planned.status == 2 and expected in planned.stderr
    assert planned == run


@pytest.mark.parametrize("command", ["prune", "quantize"])
@pytest.mark.parametrize(("name", "content"), [("none.txt", None), ("some.jsonl", b"{}"), ("ids.npy", b"no ids")])
def test_text_that_the_run_refuses_its_plan_refuses(
    here: Callable[..., Outcome], tiny: Path, tmp_path: Path, command: str, name: str, content: bytes | None
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    words = (command, tiny, "-o", tmp_path / "out", "--calibration", tmp_path / name)
    planned = here(*words, "--plan")
    assert planned == here(*words)
    assert is_one_sentence(planned) and name in planned.stderr


def test_text_on_the_hub_is_not_asked_for_by_a_plan(here: Callable[..., Outcome], tiny: Path):
    assert here("plan", tiny, "--calibration", "organisation/data").status == 0


@pytest.mark.parametrize(
    ("family", "options", "expected", "remedy"),
    [
        ("gpt2", (), "is a Conv1D", ("--format", "dense")),
        ("mixtral", (), "packed experts cannot have zero points", ("--symmetric",)),
        ("mixtral", ("--format", "gguf", "--symmetric"), "a mixtral model cannot be written as GGUF", ()),
    ],
)
def test_model_that_the_format_cannot_hold_is_refused(
    here: Callable[..., Outcome],
    tmp_path: Path,
    family: str,
    options: tuple[str, ...],
    expected: str,
    remedy: tuple[str, ...],
):
    source = save_model(tmp_path / family, {**FAMILIES, **EXPERT_FAMILIES}[family].build(vocab_size=VOCABULARY))
    command = ("quantize", source, "-o", tmp_path / "out", *options)
    assert expected in here(*command, "--plan").stderr
    assert here(*command, "--plan") == here(*command)
    if remedy:
        assert here(*command, "--plan", *remedy).status == here(*command, *remedy).status == 0


def test_a_plan_is_made_by_one_process(
    here: Callable[..., Outcome], tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = here("quantize", tiny, "-o", tmp_path / "out", "--plan")
    assert outcome.status == 2 and is_one_sentence(outcome) and "without torchrun" in outcome.stderr
