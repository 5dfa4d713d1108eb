"""From a checkpoint on disk to a pruned one: all or nothing, and the same bytes each time."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import FAMILIES, LENGTH, Family, for_each, windows
from refusals import damage_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trimfit import CalibrationConfig, InputError, PruneConfig, PruneReport, prune, prune_checkpoint
from trimfit.checkpoints import fingerprint
from trimfit.evaluate import perplexity

CPU = torch.device("cpu")


@pytest.fixture
def calibration(tmp_path: Path) -> CalibrationConfig:
    """Six windows of token ids."""
    path = tmp_path / "tokens.npy"
    numpy.save(path, windows(6).numpy())
    return CalibrationConfig(source=str(path), samples=6, sequence_length=LENGTH)


def write(directory: Path, tokenizer: PreTrainedTokenizerFast, name: str = "llama", **options: Any) -> str:
    model = FAMILIES[name].build(**options)
    model.save_pretrained(directory, max_shard_size=30_000)
    tokenizer.save_pretrained(directory)
    return str(directory)


@for_each(FAMILIES)
def test_out_is_a_plain_checkpoint(
    tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast, family: Family
):
    source = write(tmp_path / "model", word_tokenizer, family.name)
    report = prune_checkpoint(source, tmp_path / "out", PruneConfig(), calibration, device=CPU)

    expected = family.build()
    tokens = calibration.windows(word_tokenizer, expected)
    prune(expected, tokens, PruneConfig())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert fingerprint(model) == fingerprint(expected)
    assert torch.isfinite(torch.tensor(perplexity(model, windows(2))))

    sidecar = json.loads((tmp_path / "out" / "trimfit.json").read_text())
    assert sidecar["format"] == 1
    assert sidecar["source"] == source
    assert sidecar["device"] == "cpu"
    assert CalibrationConfig.model_validate(sidecar["calibration"]) == calibration
    assert sidecar["fingerprints"] == {
        "model": fingerprint(family.build()),
        "tokens": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
    }
    fields = {name: sidecar[name] for name in PruneReport.model_fields}
    assert PruneReport.model_validate(fields) == report
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "tokens.npy"}


def test_the_same_bytes_twice(tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast):
    source = write(tmp_path / "model", word_tokenizer, dtype=torch.bfloat16)
    for out in "ab":
        prune_checkpoint(source, tmp_path / out, PruneConfig(), calibration, device=CPU)
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab"]
    sidecars = [json.loads(content.pop("trimfit.json")) for content in files]
    assert files[0] == files[1]
    assert len([name for name in files[0] if name.endswith(".safetensors")]) > 1
    assert sidecars[0]["fingerprints"] == sidecars[1]["fingerprints"]


def test_the_seed_chooses_the_windows(
    tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast
):
    source = write(tmp_path / "model", word_tokenizer)
    for seed in (0, 1):
        config = calibration.model_copy(update={"seed": seed, "samples": 3})
        prune_checkpoint(source, tmp_path / f"{seed}", PruneConfig(), config, device=CPU)
    prints = [json.loads((tmp_path / f"{seed}" / "trimfit.json").read_text())["fingerprints"] for seed in (0, 1)]
    assert prints[0]["model"] == prints[1]["model"]
    assert prints[0]["tokens"] != prints[1]["tokens"]


def test_an_existing_output_is_refused_before_anything_is_read(tmp_path: Path, calibration: CalibrationConfig):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists already; choose another output or give --overwrite"):
        prune_checkpoint("./no model", tmp_path / "out", PruneConfig(), calibration, device=CPU)


def test_an_existing_output_survives_a_failure(
    tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast
):
    source = write(tmp_path / "model", word_tokenizer)
    out = tmp_path / "out"
    out.mkdir()
    (out / "trimfit.json").write_text("{}")
    (out / "mine").write_text("old")
    with pytest.raises(InputError, match="matches no linear layer"):
        prune_checkpoint(source, out, PruneConfig(ignore=("x",)), calibration, device=CPU, overwrite=True)
    assert (out / "mine").read_text() == "old"
    prune_checkpoint(source, out, PruneConfig(), calibration, device=CPU, overwrite=True)
    assert not (out / "mine").exists()


@pytest.mark.parametrize("out", ["model", "."])
def test_the_model_itself_is_never_replaced(
    tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast, out: str
):
    source = write(tmp_path / "model", word_tokenizer)
    (tmp_path / "trimfit.json").write_text("{}")  # as if the folder around it were a checkpoint too
    with pytest.raises(InputError, match=r"would destroy the model .* itself; choose another output"):
        prune_checkpoint(source, tmp_path / out, PruneConfig(), calibration, device=CPU, overwrite=True)
    assert (tmp_path / "model" / "config.json").exists()


def test_nan_weights_name_the_layer(
    tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast
):
    source = write(tmp_path / "model", word_tokenizer)
    damage_file(tmp_path / "model", "model.layers.1.self_attn.k_proj.weight", float("nan"))
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight .*has NaN or infinite entries"):
        prune_checkpoint(source, tmp_path / "out", PruneConfig(), calibration, device=CPU)
    assert not (tmp_path / "out").exists()


def test_tokens_of_another_vocabulary(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    source = write(tmp_path / "model", word_tokenizer)
    numpy.save(tmp_path / "tokens.npy", windows(4).numpy() + 1000)
    calibration = CalibrationConfig(source=str(tmp_path / "tokens.npy"), samples=4, sequence_length=LENGTH)
    with pytest.raises(InputError, match="is outside the model's vocabulary of 64"):
        prune_checkpoint(source, tmp_path / "out", PruneConfig(), calibration, device=CPU)
    assert not (tmp_path / "out").exists()


def test_a_width_that_cannot_be_split(
    tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast
):
    source = write(tmp_path / "model", word_tokenizer, intermediate_size=42)
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.down_proj: 42 inputs cannot be split into groups of"):
        prune_checkpoint(source, tmp_path / "out", PruneConfig(pattern="2:4"), calibration, device=CPU)
    config = PruneConfig(pattern="2:4", ignore=("down_proj",))
    report = prune_checkpoint(source, tmp_path / "out", config, calibration, device=CPU)
    assert len(report.layers) == 2 * 6
