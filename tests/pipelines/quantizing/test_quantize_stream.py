"""A model that stays in its files becomes the same checkpoint as one in memory, with one block in memory at a time."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from families import EVERYTHING, FAMILIES, LENGTH, windows
from refusals import damage_file
from transformers import PreTrainedTokenizerFast

from trimfit import CalibrationConfig, InputError, QuantizeConfig, QuantizeReport
from trimfit.pipelines import quantize_checkpoint
from trimfit.pipelines.quantizing import checkpoint as quantizing_checkpoint

CPU = torch.device("cpu")
DEFAULT = QuantizeConfig(bits=3, group_size=16)


def write(directory: Path, tokenizer: PreTrainedTokenizerFast, name: str = "llama", **options: Any) -> Path:
    shard_bytes = options.pop("shard_bytes", 10**9)
    EVERYTHING[name].build(**options).save_pretrained(directory, max_shard_size=shard_bytes)
    tokenizer.save_pretrained(directory)
    return directory


def refuse(*arguments: object) -> Any:
    raise AssertionError("this must not be called")


def streamed(source: Path, out: Path, config: QuantizeConfig = DEFAULT) -> QuantizeReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing_checkpoint, "load_checkpoint", refuse)
        return quantize_checkpoint(str(source), out, config, device=CPU)


def in_memory(source: Path, out: Path, config: QuantizeConfig = DEFAULT) -> QuantizeReport:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing_checkpoint, "open_stream", lambda source, device: None)
        return quantize_checkpoint(str(source), out, config, device=CPU)


def told(directory: Path) -> dict[str, Any]:
    """`trimfit.json` without what another run of the same would change."""
    sidecar = json.loads((directory / "trimfit.json").read_text())
    del sidecar["run"], sidecar["stages"]
    for part in (sidecar, *sidecar["layers"]):
        del part["seconds"], part["peak_memory"]
    return sidecar


def assert_the_same(source: Path, out: Path, config: QuantizeConfig = DEFAULT) -> None:
    """Every file, byte for byte."""
    streamed(source, out / "streamed", config)
    in_memory(source, out / "loaded", config)
    first, second = (
        {path.name: path.read_bytes() for path in (out / kind).iterdir() if path.name != "trimfit.json"}
        for kind in ("streamed", "loaded")
    )
    assert first == second and any(name.endswith(".safetensors") for name in first)
    assert told(out / "streamed") == told(out / "loaded")


@pytest.mark.parametrize(
    ("name", "shard_bytes"),
    [
        *((name, 5_000) for name in ("llama", "llama-tied", "qwen2", "gemma2", "phi3", "opt")),
        ("llama", 10**9),
        ("phi3", 10**9),
    ],
)
def test_the_result_is_that_of_a_model_in_memory(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, name: str, shard_bytes: int
):
    source = write(tmp_path / "model", word_tokenizer, name, shard_bytes=shard_bytes, dtype=torch.bfloat16)
    assert_the_same(source, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"transform": "online", "block_size": 8},
        {"rounding": "nearest", "symmetric": True, "transform": "pairs"},
        {"ignore": ("model.layers.0.*", "*.down_proj")},
    ],
)
def test_the_result_is_the_same_for_every_config(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, changes: dict[str, Any]
):
    source = write(tmp_path / "model", word_tokenizer, "qwen2")
    assert_the_same(source, tmp_path, DEFAULT.model_copy(update=changes))


def test_many_vocabulary_rows_are_summed_alike(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    """More rows than are turned to float32 at once."""
    assert_the_same(write(tmp_path / "model", word_tokenizer, vocab_size=5_000), tmp_path)


def test_zeros_of_a_pruned_model_stay(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.dim() == 2:
                parameter[:, ::2] = 0
    model.save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    assert_the_same(tmp_path / "model", tmp_path)
    assert all(layer["pruned"] and layer["zeros"] >= 0.5 for layer in told(tmp_path / "streamed")["layers"])


def test_a_model_that_cannot_be_streamed_is_loaded(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
):
    source = write(tmp_path / "model", word_tokenizer)
    torch.save(safetensors.torch.load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    with caplog.at_level(logging.INFO, "trimfit"):
        quantize_checkpoint(str(source), tmp_path / "streamed", DEFAULT, device=CPU)
    assert f"{source} is loaded as a whole: " in caplog.text
    in_memory(source, tmp_path / "loaded")
    assert told(tmp_path / "streamed") == told(tmp_path / "loaded")


def test_weights_that_are_stored_under_other_names(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    assert_the_same(write(tmp_path / "model", word_tokenizer, "gpt_neox"), tmp_path)


def test_calibration_and_other_formats_load_the_model(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    source = write(tmp_path / "model", word_tokenizer)
    numpy.save(tmp_path / "tokens.npy", windows(6).numpy())
    tokens = CalibrationConfig(source=str(tmp_path / "tokens.npy"), samples=6, sequence_length=LENGTH)
    monkeypatch.setattr(quantizing_checkpoint, "open_stream", refuse)
    report = quantize_checkpoint(str(source), tmp_path / "data", DEFAULT, tokens, device=CPU)
    assert report.windows == 6
    quantize_checkpoint(str(source), tmp_path / "dense", DEFAULT, device=CPU, format="dense")
    with pytest.raises(AssertionError, match="must not be called"):
        quantize_checkpoint(str(source), tmp_path / "packed", DEFAULT, device=CPU)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.down_proj.weight", torch.nan),
        ("model.layers.0.input_layernorm.weight", torch.inf),
        ("model.embed_tokens.weight", torch.nan),
        ("model.norm.weight", -torch.inf),
        ("model.layers.1.self_attn.k_proj.weight", None),
    ],
)
def test_damage_is_told_as_in_memory_and_nothing_is_written(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, name: str, value: float | None
):
    source = write(tmp_path / "model", word_tokenizer, "llama-tied")
    damage_file(source, name, value)
    sentences: list[str] = []
    for run in (streamed, in_memory):
        with pytest.raises(InputError) as error:
            run(source, tmp_path / "out")
        sentences.append(str(error.value))
    assert sentences[0] == sentences[1] and name in sentences[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_error_on_the_way_leaves_no_output(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
):
    source = write(tmp_path / "model", word_tokenizer)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    monkeypatch.setattr("trimfit.checkpoints.shard_writer.ShardWriter.finish", refuse)
    with pytest.raises(AssertionError):
        streamed(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out.run"}
    assert not (tmp_path / "out.run" / "result").exists()
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


# Of a family whose wiring is not known: following moments from block to block would take most of the time.
_MODEL = {"name": "nemotron", "hidden_size": 512, "intermediate_size": 128}
_BLOCK = 4 * (3 * 512 * 512 + 2 * 512 * 128)  # bytes; there are half as many heads for keys and values

# Prints two peaks of resident memory for each run, in bytes: until the first block, and from there on. What was before
# is made forgotten by the kernel, and left behind in cycles by none. The first run warms up what is made once.
_MEASURE = """
import gc, sys, torch
from pathlib import Path
from trimfit import CalibrationConfig, QuantizeConfig
from trimfit.pipelines import quantize_checkpoint

def peak():
    gc.collect()
    found = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024
    Path("/proc/self/clear_refs").write_text("5")
    return found

class Watcher:
    def stage(self, text):
        if text.startswith("block 1 of"):
            print(peak(), end=" ")
    def layer(self, record, done):
        pass

root, config = Path(sys.argv[1]), QuantizeConfig(rounding="nearest", ignore=("q_proj", "o_proj", "*.mlp.*"))
from trimfit.pipelines.quantizing import checkpoint as module
text = CalibrationConfig(source=str(root / "tokens.npy"), samples=2, sequence_length=24)
runs = [(None, "4"), (None, "4"), (None, "32"), (text, "4"), (text, "32"), ("in memory", "32")]
for how, blocks in runs:
    if how == "in memory":
        module.open_stream = lambda source, device: None
    data = how if how is text else None
    cpu = torch.device("cpu")
    quantize_checkpoint(
        str(root / blocks), root / "out", config, data, device=cpu, overwrite=True, offload=how is text,
        observer=Watcher(),
    )
    print(peak())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is told by /proc")
def test_more_blocks_need_no_more_memory(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    """Without data, and with data when it is offloaded."""
    numpy.save(tmp_path / "tokens.npy", windows(2).numpy())
    for blocks in (4, 32):
        write(tmp_path / str(blocks), word_tokenizer, num_hidden_layers=blocks, **_MODEL)
    command = [sys.executable, "-c", _MEASURE, str(tmp_path)]
    exact = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # whatever is larger goes back to the kernel at once
    result = subprocess.run(command, capture_output=True, check=True, text=True, env=exact)
    _, few, many, few_data, many_data, loaded = (
        [int(word) for word in line.split()] for line in result.stdout.splitlines()
    )
    assert many[0] - few[0] < 28 * _BLOCK / 2  # a few pages of each tensor are mapped when the skeleton is made
    assert many[1] - few[1] < 2 * _BLOCK
    assert many_data[1] - few_data[1] < 2 * _BLOCK
    assert loaded[1] - few[1] > 28 * _BLOCK
