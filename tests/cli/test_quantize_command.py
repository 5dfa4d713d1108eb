"""`trimfit quantize` that goes well: the files, the record, the bytes, the options."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_helpers import (
    CONTEXT,
    FILES,
    NEW_TOKENS,
    Outcome,
    make_model,
    make_tokenizer,
    nothing_but,
    read_json,
    read_record,
    save_model,
    trimfit,
    weights,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM, PreTrainedModel

from trimfit import QuantizeConfig, load_checkpoint, quantize
from trimfit.checkpoints import fingerprint

SIZES = ("--samples", "8", "--sequence-length", "24", "--batch-size", "2")
Here = Callable[..., Outcome]
Quantize = Callable[..., dict[str, Any]]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 35)[None]).logits


def in_memory(directory: Path, scale_dtype: torch.dtype | None = None, **options: Any) -> PreTrainedModel:
    model = load_checkpoint(str(directory)).model
    quantize(model, QuantizeConfig.model_validate(options), scale_dtype=scale_dtype)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("quantized")


@pytest.fixture(scope="module")
def runs(tiny: Path, folder: Path, pool: ThreadPoolExecutor) -> dict[str, Outcome]:
    """The real command with nothing but its defaults, twice: the second time over an existing output."""
    for name in ("again", "again/old"):
        (folder / name).mkdir()
    (folder / "again" / "trimfit.json").write_text("{}")
    started = {
        "first": pool.submit(trimfit, "quantize", tiny, "-o", folder / "first", "--json"),
        "again": pool.submit(trimfit, "quantize", tiny, "-o", folder / "again", "--overwrite", FORCE_COLOR="1"),
    }
    return {name: future.result() for name, future in started.items()}


@pytest.fixture(scope="module")
def first(runs: dict[str, Outcome], folder: Path) -> Path:
    assert runs["first"].status == 0, runs["first"].stderr
    return folder / "first"


@pytest.fixture
def run(here: Here, tiny: Path, tmp_path: Path) -> Quantize:
    """Quantizes the tiny model in this process to `tmp_path / name` and gives the record."""

    def run(*options: str | Path, name: str = "out", model: Path = tiny) -> dict[str, Any]:
        outcome = here("quantize", model, "-o", tmp_path / name, *options)
        assert outcome.status == 0, outcome.stderr
        assert outcome.stderr == ""
        return read_record(tmp_path / name) | {"stdout": outcome.stdout}

    return run


def test_nothing_but_the_checkpoint(first: Path) -> None:
    assert nothing_but(first, FILES)
    assert nothing_but(first.parent, ["first", "again"])


def test_plain_transformers_loads_it(first: Path, tiny: Path) -> None:
    model, expected = AutoModelForCausalLM.from_pretrained(first), in_memory(tiny)
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(expected))
    config = json.loads((first / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "compressed-tensors"
    dense = json.loads((tiny / "config.json").read_text())
    assert config == dense
    assert GenerationConfig.from_pretrained(first).max_new_tokens == NEW_TOKENS
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (first, tiny))
    sample = "the größte cat\t日本"
    assert tokenizer(sample).input_ids == original(sample).input_ids


def test_record_is_complete(first: Path, tiny: Path) -> None:
    record = read_record(first)
    assert record["source"] == str(tiny)
    assert record["device"] == "cpu"
    assert QuantizeConfig.model_validate(record["config"]) == QuantizeConfig()
    assert (record["calibration"], record["self_sample"]) == (None, None)
    assert (record["windows"], record["window_length"]) == (0, 0)
    assert record["fingerprints"] == {"model": fingerprint(load_checkpoint(str(tiny)).model), "tokens": None}
    assert {"python", "trimfit", "torch", "transformers", "safetensors", "numpy"} <= record["versions"].keys()
    assert record["seconds"] > 0
    assert record["peak_memory"] > 2**20
    assert len(record["layers"]) == 14
    stored = weights(first)
    for layer in record["layers"]:
        assert layer["shape"] == stored[f"{layer['name']}.weight_shape"].tolist()
        assert f"layers.{layer['block']}." in layer["name"]
        assert 4 < layer["bits_per_weight"] < 5
        assert 0 < layer["weight_error"] < 0.05
        assert layer["output_error"] is None
        assert layer["pruned"] is False
        assert layer["seconds"] > 0


def test_json_alone_on_standard_output(runs: dict[str, Outcome], first: Path) -> None:
    printed, record = read_json(runs["first"].stdout), read_record(first)
    assert printed["output"] == str(first)
    assert printed["file_format"] == "packed"
    assert printed["layers"] == record["layers"]
    assert printed["config"] == record["config"]


def test_quiet_when_not_a_terminal(runs: dict[str, Outcome], folder: Path) -> None:
    assert [run.stderr for run in runs.values()] == ["", ""]  # even where FORCE_COLOR asks for colours
    summary = runs["again"].stdout
    assert "\x1b" not in summary
    assert "\r" not in summary
    for words in (
        "14 layers",
        "4 bits",
        "groups of 128, asymmetric",
        "no data was asked for or read, and no forward pass was run",
        "weight error",
        "left out: Q and K are no pair",
        str(folder / "again"),
        "transformers with compressed-tensors",
    ):
        assert words in summary


def test_the_same_bytes_twice(runs: dict[str, Outcome], first: Path) -> None:
    again = first.parent / "again"
    assert nothing_but(again, FILES)  # all that was there before is gone
    for name in FILES - {"trimfit.json"}:  # that one tells seconds and memory
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    mine, theirs = read_record(first), read_record(again)
    for record in (mine, theirs):
        for entry in (record, *record["layers"]):
            for clock in ("seconds", "peak_memory"):
                del entry[clock]
        del record["run"], record["stages"]
    assert mine == theirs


OPTIONS: dict[str, dict[str, Any]] = {
    "--bits 3 --group-size 16 --symmetric": {"bits": 3, "group_size": 16, "symmetric": True},
    "--group-size channel --rounding nearest --transform none": {
        "group_size": None,
        "rounding": "nearest",
        "transform": "none",
    },
    "--transform pairs --damping 0": {"transform": "pairs", "damping": 0},
    "--transform online --block-size 8 --learned-steps 2": {
        "transform": "online",
        "block_size": 8,
        "learned_steps": 2,
    },
    "--batch-size 3 --ignore *.q_proj --ignore re:layers.1.*down": {
        "batch_size": 3,
        "ignore": ["*.q_proj", "re:layers.1.*down"],
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_options(run: Quantize, options: str, tmp_path: Path) -> None:
    record = run(*options.split())
    defaults = json.loads(QuantizeConfig().model_dump_json())
    assert record["config"] == defaults | OPTIONS[options]
    ignored = 3 if "ignore" in options else 0
    assert len(record["layers"]) == 14 - ignored
    online = "online" in options
    assert (tmp_path / "out" / "model.safetensors").exists() != online
    assert ("trimfit.load loads it" in record["stdout"]) == online
    assert ("multiply-adds" in record["stdout"]) == online


@pytest.mark.parametrize("transform", ["free", "online"])
def test_dense(run: Quantize, tiny: Path, tmp_path: Path, transform: str) -> None:
    steps = ("--learned-steps", "0") if transform == "online" else ()
    record = run("--format", "dense", "--bits", "3", "--transform", transform, *steps)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(model), logits(in_memory(tiny, bits=3, transform=transform, learned_steps=0)))
    assert weights(tmp_path / "out").keys() == weights(tiny).keys()
    assert "plain transformers loads it" in record["stdout"]
    assert "multiply-adds" not in record["stdout"]  # nothing is done at run time


def test_gguf(run: Quantize, here: Here, tmp_path: Path) -> None:
    wide = save_model(tmp_path / "wide", make_model(intermediate=64))
    record = run("--format", "gguf", "--symmetric", "--group-size", "32", model=wide)
    assert nothing_but(tmp_path / "out", ["model.gguf", "tokenizer.json", "tokenizer_config.json", "trimfit.json"])
    assert "llama.cpp loads it" in record["stdout"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    expected = in_memory(wide, torch.float16, symmetric=True, group_size=32)  # scales as GGUF has them
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name].bfloat16(), tensor), name


# With data


def test_the_model_is_its_own_data(here: Here, tiny: Path, tmp_path: Path) -> None:
    def run(name: str, calibration: str | Path, *options: str) -> Outcome:
        arguments = ("quantize", tiny, "-o", tmp_path / name, "--calibration", calibration, "--bits", "3", *SIZES)
        return here(*arguments, *options)

    outcomes = [
        run("first", "self"),
        run("again", "self", "--json"),
        run("other", "self", "--seed", "1"),
        run("reused", tmp_path / "first" / "calibration.npy"),
    ]
    assert [outcome.status for outcome in outcomes] == [0] * 4
    for outcome in outcomes[:3]:  # random weights write no text, which is said
        assert outcome.stderr.startswith("warning: the model writes noise") and outcome.stderr.count("\n") == 1
    assert outcomes[3].stderr == ""
    first = tmp_path / "first"
    assert nothing_but(first, FILES | {"calibration.npy"})
    assert "192 calibration tokens (self)" in outcomes[0].stdout
    assert "no data" not in outcomes[0].stdout
    record = read_record(first)
    assert record["calibration"]["source"] == "self"
    assert (record["windows"], record["window_length"]) == (8, 24)
    assert record["self_sample"]["entropy"] > 0
    assert all(0 < layer["output_error"] < 1 for layer in record["layers"])
    kept = np.load(first / "calibration.npy")
    assert kept.shape == (8, 24)
    assert (kept[:, 0] == make_tokenizer().bos_token_id).all()
    assert read_json(outcomes[1].stdout)["windows"] == 8
    for name in (FILES | {"calibration.npy"}) - {"trimfit.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes(), name
    written = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "other", "reused")}
    assert written["other"] != written["first"]
    assert written["reused"] == written["first"]
    assert not (tmp_path / "reused" / "calibration.npy").exists()
    assert read_record(tmp_path / "reused")["fingerprints"] == record["fingerprints"]


def test_longer_windows_than_the_context_are_said(here: Here, tiny: Path, text: Path, tmp_path: Path) -> None:
    sizes = ("--samples", "4", "--sequence-length", "100")
    outcome = here("quantize", tiny, "-o", tmp_path / "out", "--calibration", text, *sizes)
    assert outcome.status == 0
    assert outcome.stderr.startswith("warning: windows of 100 tokens were asked for")
    assert len(outcome.stderr.splitlines()) == 1
    assert read_record(tmp_path / "out")["window_length"] == CONTEXT


# A pruned model


@pytest.mark.parametrize(("pattern", "transform"), [("2:4", "free"), ("4:8", "online")])
def test_prune_then_quantize(
    run: Quantize, here: Here, tiny: Path, text: Path, tmp_path: Path, pattern: str, transform: str
) -> None:
    pruned = tmp_path / "pruned"
    assert here("prune", tiny, "-o", pruned, "--pattern", pattern, "--calibration", text, *SIZES).status == 0
    record = run("--calibration", text, *SIZES, "--bits", "3", "--transform", transform, model=pruned)
    assert "14 layers were pruned; their zeros stay" in record["stdout"]
    assert "left out: " in record["stdout"]
    assert "transformers with compressed-tensors loads it" in record["stdout"]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    logits(model)  # which unpacks the weights
    group = int(pattern[-1])
    for layer in record["layers"]:
        before = weights(pruned)[f"{layer['name']}.weight"]
        after = model.get_parameter(f"{layer['name']}.weight")
        assert (after[before == 0] == 0).all()
        assert (after.unflatten(1, (-1, group)) != 0).sum(2).max() <= group // 2
        assert layer["pruned"] and layer["zeros"] >= 0.5


def test_a_packed_model_is_scored_without_bars_of_other_libraries(
    run: Quantize, here: Here, text: Path, tmp_path: Path
) -> None:
    run("--rounding", "nearest")
    outcome = here("eval", tmp_path / "out", "--text", text, "--window", "32", "--limit", "2")
    assert (outcome.status, outcome.stderr) == (0, "")
