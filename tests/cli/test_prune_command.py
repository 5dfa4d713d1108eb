"""`trimfit prune` that goes well: the files, the record, the bytes, the options."""

import hashlib
import json
import os
import shutil
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
    trimfit,
    weights,
    write_text,
)
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from trimfit import CalibrationConfig, load_checkpoint
from trimfit.checkpoints import fingerprint

# The paper's own problem, in which every layer loses the same share; the defaults have a test of their own.
PLAIN = ("--selector", "sparsegpt", "--target", "layer", "--no-guard")
SMALL = ("--samples", "12", "--sequence-length", "32", "--batch-size", "5")
SIZES = (*SMALL, *PLAIN)
Here = Callable[..., Outcome]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pruned")


@pytest.fixture(scope="module")
def runs(tiny: Path, text: Path, folder: Path, pool: ThreadPoolExecutor) -> dict[str, Outcome]:
    """The real command three times: a seed, the same again, and another one over an existing output."""
    for name in ("other", "other/old"):
        (folder / name).mkdir()
    (folder / "other" / "trimfit.json").write_text("{}")

    def start(name: str, *options: str, **environment: str):
        arguments = ("prune", tiny, "-o", folder / name, "--calibration", text, *SIZES, *options)
        return pool.submit(trimfit, *arguments, **environment)

    started = {
        "first": start("first", "--json"),
        "again": start("again", "--seed", "0"),
        "other": start("other", "--seed", "1", "--overwrite", FORCE_COLOR="1"),
    }
    return {name: future.result() for name, future in started.items()}


@pytest.fixture(scope="module")
def first(runs: dict[str, Outcome], folder: Path) -> Path:
    assert runs["first"].status == 0, runs["first"].stderr
    return folder / "first"


@pytest.fixture
def prune(here: Here, tiny: Path, text: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Prunes the tiny model in this process to `tmp_path / name` and gives the record."""

    def prune(*options: str | Path, name: str = "out", calibration: Path = text) -> dict[str, Any]:
        outcome = here("prune", tiny, "-o", tmp_path / name, "--calibration", calibration, *SIZES, *options)
        assert outcome.status == 0, outcome.stderr
        return read_record(tmp_path / name)

    return prune


def test_every_file_is_there_and_nothing_beside(first: Path) -> None:
    assert nothing_but(first, FILES)
    assert nothing_but(first.parent, ["first", "again", "other"])


def test_plain_transformers_loads_it(first: Path, tiny: Path) -> None:
    model, dense = (AutoModelForCausalLM.from_pretrained(path, dtype="auto") for path in (first, tiny))
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert model.config.to_diff_dict() == dense.config.to_diff_dict()
    assert GenerationConfig.from_pretrained(first).max_new_tokens == NEW_TOKENS
    tokenizer, original = (AutoTokenizer.from_pretrained(path) for path in (first, tiny))
    sample = "the größte cat\t日本"
    assert tokenizer(sample).input_ids == original(sample).input_ids
    assert tokenizer.decode(tokenizer(sample, add_special_tokens=False).input_ids) == sample


def test_half_of_each_layer_is_zero_and_the_rest_of_the_model_is_untouched(first: Path, tiny: Path) -> None:
    pruned, dense = weights(first), weights(tiny)
    assert pruned.keys() == dense.keys()
    linear = {name for name in dense if "_proj" in name}
    assert len(linear) == 14
    for name, weight in pruned.items():
        if name in linear:
            assert int((weight == 0).sum()) == weight.numel() // 2, name
            assert torch.isfinite(weight).all()
        else:
            assert torch.equal(weight, dense[name]), name


def test_record_is_complete(first: Path, tiny: Path, text: Path) -> None:
    record = read_record(first)
    assert record["source"] == str(tiny)
    assert record["device"] == "cpu"
    assert record["config"]["selector"] == "sparsegpt"
    assert record["config"]["refit"] == "optimal"
    assert record["calibration"]["source"] == str(text)
    assert record["calibration"]["seed"] == 0
    assert {"python", "trimfit", "torch", "transformers", "safetensors", "numpy"} <= record["versions"].keys()
    assert (record["windows"], record["held_out_windows"], record["window_length"]) == (10, 2, 32)
    assert record["seconds"] > 0
    assert record["peak_memory"] > 2**20

    dense = load_checkpoint(str(tiny))
    windows = CalibrationConfig(source=str(text), samples=12, sequence_length=32)
    tokens = windows.windows(dense.tokenizer, dense.model)
    assert record["fingerprints"] == {
        "model": fingerprint(dense.model),
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }


def test_record_of_every_layer(first: Path) -> None:
    layers = read_record(first)["layers"]
    pruned = weights(first)
    assert {f"{layer['name']}.weight" for layer in layers} == {name for name in pruned if "_proj" in name}
    for layer in layers:
        weight = pruned[f"{layer['name']}.weight"]
        assert layer["shape"] == list(weight.shape)
        assert f"layers.{layer['block']}." in layer["name"]
        assert layer["sparsity"] == pytest.approx((weight == 0).double().mean().item())
        for windows in ("calibration", "held_out"):
            masked, final, stored = (layer[stage][windows] for stage in ("masked", "final", "stored"))
            assert 0 < final < masked < 1
            assert stored == pytest.approx(final, rel=0.05)
            assert stored != final  # the model's dtype is bfloat16
        assert 0 <= layer["certificate"] <= 1e-4
        assert 0 <= layer["worst_row"] <= 1e-4
        assert layer["status"] == "optimal"
        assert layer["steps"] >= 1
        assert layer["solver"]
        assert layer["damping"] == 0.01
        assert layer["seconds"] > 0
        assert layer["peak_memory"] > 2**20


def test_json_alone_on_standard_output(runs: dict[str, Outcome], first: Path) -> None:
    printed, record = read_json(runs["first"].stdout), read_record(first)
    assert printed["output"] == str(first)
    assert printed["layers"] == record["layers"]
    assert printed["config"] == record["config"]


def test_quiet_when_not_a_terminal(runs: dict[str, Outcome], folder: Path) -> None:
    assert [run.stderr for run in runs.values()] == ["", "", ""]  # even where FORCE_COLOR asks for colours
    summary = runs["again"].stdout
    assert "\x1b" not in summary
    assert "\r" not in summary
    for words in ("14 layers", "50.00%", "sparsegpt", "held-out", "certificate", "steps", str(folder / "again")):
        assert words in summary


def test_same_seed_same_bytes(runs: dict[str, Outcome], first: Path) -> None:
    again, other = first.parent / "again", first.parent / "other"
    for name in FILES - {"trimfit.json"}:  # that one tells seconds and memory
        assert (again / name).read_bytes() == (first / name).read_bytes(), name
    assert (other / "model.safetensors").read_bytes() != (first / "model.safetensors").read_bytes()
    clocks = {"seconds", "peak_memory"}
    mine, theirs = read_record(first), read_record(again)
    assert mine.pop("run") != theirs.pop("run")
    assert mine.pop("stages").keys() == theirs.pop("stages").keys()
    for record in (mine, theirs):
        for entry in (record, *record["layers"]):
            for clock in clocks:
                del entry[clock]
    assert mine == theirs


def test_overwrite_replaces_all_that_was_there(runs: dict[str, Outcome], folder: Path) -> None:
    assert runs["other"].status == 0
    assert nothing_but(folder / "other", FILES)
    assert read_record(folder / "other")["calibration"]["seed"] == 1


def test_json_lines_are_the_same_text(prune: Callable[..., dict[str, Any]], text: Path, tmp_path: Path) -> None:
    lines = tmp_path / "words.jsonl"
    lines.write_text(json.dumps({"text": "no", "body": text.read_text(encoding="utf-8")}) + "\n", encoding="utf-8")
    record = prune(name="from_text")
    same = prune("--field", "body", name="from_lines", calibration=lines)
    assert same["fingerprints"] == record["fingerprints"]
    assert same["calibration"]["field"] == "body"
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("from_text", "from_lines")]
    assert written[0] == written[1]


def test_token_ids_from_npy_and_safetensors(prune: Callable[..., dict[str, Any]], text: Path, tmp_path: Path) -> None:
    ids = make_tokenizer()(text.read_text(encoding="utf-8")).input_ids
    np.save(tmp_path / "ids.npy", np.array(ids, dtype=np.uint16))
    save_file({"input_ids": torch.tensor(ids)}, tmp_path / "ids.safetensors")
    records = [prune(name=kind, calibration=tmp_path / f"ids.{kind}") for kind in ("npy", "safetensors")]
    assert records[0]["fingerprints"] == records[1]["fingerprints"]
    assert records[0]["windows"] + records[0]["held_out_windows"] == 12
    written = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("npy", "safetensors")]
    assert written[0] == written[1]


def test_demo_calibration_needs_no_file(here: Here, tiny: Path, tmp_path: Path) -> None:
    outcome = here("prune", tiny, "-o", tmp_path / "out", *SIZES)
    assert outcome.status == 0, outcome.stderr
    assert read_record(tmp_path / "out")["calibration"]["source"] == "demo"


def test_ignored_layers_stay_dense(prune: Callable[..., dict[str, Any]], tiny: Path, tmp_path: Path) -> None:
    record = prune(
        "--ignore", "*.q_proj", "--ignore", r"re:mlp\.(gate|up)_proj$", "--ignore", "model.layers.1.*.o_proj"
    )
    dense, pruned = weights(tiny), weights(tmp_path / "out")
    ignored = {name for name in dense if "q_proj" in name or "gate" in name or "up_proj" in name}
    ignored.add("model.layers.1.self_attn.o_proj.weight")
    assert {f"{layer['name']}.weight" for layer in record["layers"]} == {n for n in dense if "_proj" in n} - ignored
    for name in ignored:
        assert torch.equal(dense[name], pruned[name]), name


def test_summary_counts_layers_that_lose_nothing(here: Here, tiny: Path, text: Path, tmp_path: Path) -> None:
    """With the target "layer" there is nothing to refit in them, and the summary blames neither solver nor guard."""
    options = ("--keep-dense", "down_proj", "--target", "layer", "--no-guard", "--selector", "wanda")
    outcome = here("prune", tiny, "-o", tmp_path / "out", "--calibration", text, *SIZES, *options)
    said = " ".join(outcome.stdout.split())
    assert "14 layers, 2 of them kept dense, pruned to " in said
    assert "each of the 12 refitted layers is proven within" in said
    assert "did not reach the tolerance" not in said and "keep simpler weights" not in said


@pytest.mark.parametrize(
    ("samples", "options", "told"),
    [
        (6, (), True),  # 160 tokens for 32 inputs
        (6, ("--damping", "auto"), False),
        (6, ("--refit", "none"), False),
        (6, ("--damping", "0.1"), False),
        (32, (), False),
    ],
)
def test_few_tokens_are_told_with_what_helps(
    here: Here, tiny: Path, text: Path, tmp_path: Path, samples: int, options: tuple[str, ...], told: bool
) -> None:
    few = ("--samples", str(samples), "--sequence-length", "32", "--selector", "wanda", *options)
    outcome = here("prune", tiny, "-o", tmp_path / "out", "--calibration", text, *few)
    assert outcome.status == 0, outcome.stderr
    said = " ".join(outcome.stdout.split())
    hint = "tokens for each input: more windows (--samples), or --damping auto, may give a better model"
    assert (hint in said) is told


def test_what_helps_with_few_tokens_is_possible(here: Here, tiny: Path, text: Path, tmp_path: Path) -> None:
    few = ("--samples", "6", "--sequence-length", "32", "--selector", "wanda", "--held-out", "0")
    first = here("prune", tiny, "-o", tmp_path / "out", "--calibration", text, *few)
    assert "--damping 0.1, may give a better model" in " ".join(first.stdout.split())
    assert here("prune", tiny, "-o", tmp_path / "more", "--calibration", text, *few, "--damping", "0.1").status == 0


def test_the_text_of_the_demo_is_told_to_be_of_one_kind(here: Here, tiny: Path, text: Path, tmp_path: Path) -> None:
    few = ("--samples", "2", "--sequence-length", "32", "--selector", "magnitude", "--held-out", "0")
    told = "for a model of anything else give --calibration a text of its own kind"
    for number, (options, expected) in enumerate([((), True), (("--calibration", text), False)]):
        outcome = here("prune", tiny, "-o", tmp_path / str(number), *few, *options)
        assert outcome.status == 0, outcome.stderr
        assert (told in " ".join(outcome.stdout.split())) is expected


def test_pattern_holds_in_every_group(prune: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    record = prune("--pattern", "2:4", "--selector", "wanda", "--solver", "cholesky")
    assert record["config"]["pattern"] == "2:4"
    for name, weight in weights(tmp_path / "out").items():
        if "_proj" in name:
            assert (weight.unflatten(1, (-1, 4)) != 0).sum(2).max() == 2, name
    assert {layer["solver"] for layer in record["layers"]} == {"Cholesky"}


@pytest.mark.parametrize(
    "options",
    [
        ("--selector", "magnitude", "--scope", "layer", "--sparsity", "0.3"),
        ("--selector", "thanos", "--refit", "own", "--sparsity", "0.7"),
        ("--selector", "wanda", "--refit", "none", "--sparsity", "0.5"),
        ("--selector", "wanda", "--solver", "cg-diagonal", "--capture", "block", "--tolerance", "1e-3"),
        ("--sparsity", "0.999"),
        ("--held-out", "0", "--damping", "0"),
        ("--samples", "1", "--sequence-length", "2"),
        ("--batch-size", "1000000"),
    ],
    ids=" ".join,
)
def test_options(prune: Callable[..., dict[str, Any]], options: tuple[str, ...], tmp_path: Path) -> None:
    given = {name[2:].replace("-", "_"): value for name, value in zip(options[::2], options[1::2], strict=True)}
    record = prune(*options)
    kept = {**record["calibration"], **record["config"]}
    for name, value in given.items():
        assert str(kept[name]) == value or kept[name] == float(value), name
    share = float(given.get("sparsity", 0.5))
    sizes = [layer["shape"][0] * layer["shape"][1] for layer in record["layers"]]
    total = sum(layer["sparsity"] * size for layer, size in zip(record["layers"], sizes, strict=True))
    assert round(total) == round(share * sum(sizes))
    for layer in record["layers"]:
        weight = weights(tmp_path / "out")[f"{layer['name']}.weight"]
        pruned = round(layer["sparsity"] * weight.numel())
        assert int((weight == 0).sum()) >= pruned
        assert abs(pruned - share * weight.numel()) < 1  # up or down, so that the total is exact
        assert (layer["certificate"] is None) == (record["config"]["refit"] != "optimal")
        assert (layer["final"]["held_out"] is None) == (record["held_out_windows"] == 0)


def test_sparsity_zero_changes_nothing(prune: Callable[..., dict[str, Any]], tiny: Path, tmp_path: Path) -> None:
    record = prune("--sparsity", "0")
    assert {layer["final"]["calibration"] for layer in record["layers"]} == {0}
    dense = weights(tiny)
    for name, weight in weights(tmp_path / "out").items():
        assert torch.equal(weight, dense[name]), name


def test_dead_weights_and_inputs_are_no_obstacle(here: Here, text: Path, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0.self_attn.o_proj" in name or "layers.1.mlp.up_proj" in name:
                parameter.zero_()  # so the inputs of the down projection are all zero too
    source = tmp_path / "dead"
    model.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    outcome = here("prune", source, "-o", tmp_path / "out", "--calibration", text, *SIZES, "--json")
    assert outcome.status == 0, outcome.stderr
    assert read_json(outcome.stdout)["layers"] == read_record(tmp_path / "out")["layers"]


def test_only_old_weight_files(here: Here, text: Path, tmp_path: Path) -> None:
    model = make_model()
    source = tmp_path / "old"
    model.config.save_pretrained(source)
    make_tokenizer().save_pretrained(source)
    torch.save(model.state_dict(), source / "pytorch_model.bin")
    outcome = here("prune", source, "-o", tmp_path / "out", "--calibration", text, *SIZES)
    assert outcome.status == 0, outcome.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


def test_longer_windows_than_the_context_and_more_than_the_text_are_said(
    here: Here, tiny: Path, tmp_path: Path
) -> None:
    few = write_text(tmp_path / "few.txt", words=60)
    outcome = here("prune", tiny, "-o", tmp_path / "out", "--calibration", few, "--sequence-length", "100")
    assert outcome.status == 0
    lines = outcome.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warning: ") for line in lines)
    assert str(CONTEXT) in lines[0]
    assert read_record(tmp_path / "out")["window_length"] == CONTEXT


@pytest.mark.parametrize(
    ("model", "out", "lies_at"),
    [
        ("a model", "an output", "an output"),
        ("a model/", "out/", "out"),
        ("./a model", "./out", "out"),
        ("link", "[red]out", "[red]out"),
        ("~/a model", "~/out", "out"),
        ("a model", "a model/inner", "a model/inner"),
        ("a model", "a model/../out", "out"),
    ],
)
def test_odd_paths(
    here: Here,
    tiny: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    out: str,
    lies_at: str,
) -> None:
    shutil.copytree(tiny, tmp_path / "a model")
    (tmp_path / "link").symlink_to("a model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    outcome = here("prune", model, "-o", out, "--calibration", os.path.relpath(text), *SIZES)
    assert outcome.status == 0, outcome.stderr
    assert nothing_but(tmp_path / lies_at, FILES)
    assert out.removeprefix("~").removeprefix("./").rstrip("/") in outcome.stdout
    kept = {path.name for path in (tmp_path / "a model").iterdir()} - {"inner"}
    assert kept == FILES - {"trimfit.json"}


def test_defaults(here: Here, tiny: Path, text: Path, tmp_path: Path) -> None:
    """Joint masks, the dense target, and layers that share the sparsity unevenly: exact in total, and said by block."""
    outcome = here("prune", tiny, "-o", tmp_path / "out", "--calibration", text, *SMALL, "--sparsity", "0.6")
    assert outcome.status == 0, outcome.stderr
    record = read_record(tmp_path / "out")
    assert (record["config"]["selector"], record["config"]["target"]) == ("joint", "dense")
    zeros = {name: int((weight == 0).sum()) for name, weight in weights(tmp_path / "out").items() if "_proj" in name}
    total = sum(layer["shape"][0] * layer["shape"][1] for layer in record["layers"])
    assert sum(zeros.values()) == round(0.6 * total)
    assert len({layer["sparsity"] for layer in record["layers"]}) > 1
    for budget in record["allocation"]:
        layers = [layer for layer in record["layers"] if layer["block"] == budget["block"]]
        assert budget["pruned"] == sum(zeros[f"{layer['name']}.weight"] for layer in layers)
        assert budget["cost"] > 0
    for layer in record["layers"]:
        assert (layer["certificate"] is not None) == (layer["accepted"] == "optimal")
