"""With data, too, a model of which one block at a time is in memory becomes the same checkpoint, byte for byte."""

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import EVERYTHING, EXPERT_FAMILIES, LENGTH, windows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trimfit import CalibrationConfig, InputError, QuantizeConfig, QuantizeReport, load, quantize_checkpoint
from trimfit.checkpoints.stream import Stream
from trimfit.pipelines import resume
from trimfit.pipelines.quantizing import checkpoint as quantizing_checkpoint

CPU = torch.device("cpu")
DEFAULT = QuantizeConfig(bits=3, group_size=8, block_size=8, learned_steps=2)
LIMIT = LENGTH * 32 * 2 * 3  # bytes: hidden states of three windows


def write(directory: Path, tokenizer: PreTrainedTokenizerFast, name: str, **options: Any) -> Path:
    (EVERYTHING | EXPERT_FAMILIES)[name].build(**options).save_pretrained(directory, max_shard_size=20_000)
    tokenizer.save_pretrained(directory)
    numpy.save(directory.parent / "tokens.npy", windows(8).numpy())
    return directory


def quantize(source: Path, name: str, config: QuantizeConfig = DEFAULT, **options: Any) -> QuantizeReport:
    text = CalibrationConfig(source=str(source.parent / "tokens.npy"), samples=8, sequence_length=LENGTH)
    calibration = options.pop("calibration", text)
    return quantize_checkpoint(str(source), source.parent / name, config, calibration, device=CPU, **options)


def files(directory: Path) -> dict[str, Any]:
    """All files; `trimfit.json` without times, memory and the name of the run."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in directory.iterdir()}
    told = json.loads(found["trimfit.json"])
    for part in (told, *told["layers"]):
        del part["seconds"], part["peak_memory"]
    del told["run"], told["stages"]
    return {**found, "trimfit.json": told}


@pytest.mark.parametrize(
    ("name", "form", "changes"),
    [
        *((name, "packed", {}) for name in ("llama-tied", "gemma3_text", "opt")),
        *((name, "dense", {}) for name in ("llama-tied", "gpt2", "mixtral", "gpt_oss")),
        ("llama", "packed", {"transform": "online"}),
        ("llama", "dense", {"transform": "online", "ignore": ("re:[.]0[.]mlp", "*.1.*.q_proj")}),
    ],
)
def test_byte_for_byte(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, name: str, form: Any, changes: dict[str, Any]
) -> None:
    source = write(tmp_path / "model", word_tokenizer, name, dtype=torch.bfloat16)
    config = DEFAULT.model_copy(update=changes)
    quantize(source, "in memory", config, format=form)
    quantize(source, "offloaded", config, format=form, offload=True, memory_limit=LIMIT)
    assert files(tmp_path / "in memory") == files(tmp_path / "offloaded")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "tokens.npy", "in memory", "offloaded"}
    if changes.get("transform") != "online":
        AutoModelForCausalLM.from_pretrained(tmp_path / "offloaded")


def test_dense_without_data(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "model", word_tokenizer, "qwen2")
    quantize(source, "in memory", calibration=None, format="dense")
    quantize(source, "offloaded", calibration=None, format="dense", offload=True)
    assert files(tmp_path / "in memory") == files(tmp_path / "offloaded")


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_one_block_at_a_time(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    """Seen by what is not on the meta device whenever one is loaded; states above the limit are in files then."""
    source = write(tmp_path / "model", word_tokenizer, "llama", num_hidden_layers=3)
    plain, seen, states = Stream.loaded, list[int](), 0

    def loaded(self: Stream, block: str, then: str | None = None) -> Any:
        nonlocal states
        states = max(states, len(list((tmp_path / "out.run").glob("states-*"))))
        layers: Any = self.checkpoint.model.get_submodule("model.layers")
        seen.append(sum(any(not p.is_meta for p in layer.parameters()) for layer in layers))
        return plain(self, block, then)

    monkeypatch.setattr(Stream, "loaded", loaded)
    config = DEFAULT.model_copy(update={"batch_size": 2})
    quantize(source, "out", config, offload=True, memory_limit=2 * LENGTH * 32 * 4, format=form)
    assert len(seen) >= 3 * 3 and set(seen) == {0}
    assert states == 4 - 1  # one of four batches is below the limit


@pytest.mark.parametrize(
    ("name", "changes"),
    [("qwen2", {}), ("qwen2", {"transform": "online"}), ("mixtral", {"symmetric": True}), ("llama-tied", {})],
)
@pytest.mark.parametrize("data", [False, True])
def test_blocks_of_a_large_result_are_files_of_it(
    tmp_path: Path,
    word_tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changes: dict[str, Any],
    data: bool,
) -> None:
    """They go straight there, are not written twice, and hold what the one file of a small result does."""
    source = write(tmp_path / "model", word_tokenizer, name, dtype=torch.bfloat16, num_hidden_layers=3)
    config = DEFAULT.model_copy(update=changes)
    options = {"offload": True} if data else {"calibration": None}
    quantize(source, "small", config, **options)
    linked: list[Path] = []
    plain_link = os.link
    monkeypatch.setattr("trimfit.pipelines.quantizing.save.SHARD_BYTES", 3000)
    monkeypatch.setattr(os, "link", lambda old, new: linked.append(old) or plain_link(old, new))
    with pytest.raises(_Killed):
        quantize(source, "out", config, **options, observer=_Killer())
    with monkeypatch.context() as patch:
        patch.setattr("trimfit.pipelines.quantizing.save.finish_packed", _killed)
        with pytest.raises(_Killed):
            resume(tmp_path / "out")
    assert [path.name for path in linked] == [f"part-0000{2 * i}.safetensors" for i in range(3)]
    parts = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.run").glob("part-*")}
    assert len(parts) == 2 * 3
    resume(tmp_path / "out")
    assert not (tmp_path / "out.run").exists()
    stem = "trimfit" if changes.get("transform") == "online" else "model"
    shards = sorted((tmp_path / "out").glob(f"{stem}-*.safetensors"))
    assert [path.name for path in shards] == [f"{stem}-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert all(path.stat().st_mtime_ns == parts[f"part-0000{2 * i}.safetensors"] for i, path in enumerate(shards[:3]))
    held = [load_file(path) for path in shards]
    whole = load_file(tmp_path / "small" / f"{stem}.safetensors")
    assert sorted(name for file in held for name in file) == sorted(whole)
    assert all(same(file[name], whole[name]) for file in held for name in file)
    models = [load(str(tmp_path / where)) for where in ("small", "out")]
    logits = [model(windows(2)).logits for model in models]
    assert same(*logits)


def _killed(*arguments: Any) -> None:
    raise _Killed


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


class _Killed(BaseException):
    """Ends a run as nothing in it expects."""


class _Killer:
    """Ends the run when the first block is kept."""

    def stage(self, text: str) -> None:
        pass

    def layer(self, record: Any, done: float) -> None:
        raise _Killed


@pytest.mark.parametrize(("form", "first"), [("packed", True), ("dense", False)])
def test_the_other_way_goes_on(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, form: Any, first: bool) -> None:
    """And the same way by `resume`, which knows that it is offloaded."""
    source = write(tmp_path / "model", word_tokenizer, "qwen2", dtype=torch.bfloat16)
    for name, offload in (("out", first), ("resumed", True)):
        with pytest.raises(_Killed):
            quantize(source, name, offload=offload, memory_limit=LIMIT, observer=_Killer(), format=form)
    quantize(source, "out", offload=not first, format=form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantizing_checkpoint, "load_checkpoint", None)
        resume(tmp_path / "resumed")
    quantize(source, "plain", format=form)
    assert files(tmp_path / "out") == files(tmp_path / "resumed") == files(tmp_path / "plain")


def test_what_cannot_be_offloaded_is_said(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "model", word_tokenizer, "llama")
    with pytest.raises(InputError, match="a model that is offloaded cannot write its own windows"):
        quantize(source, "out", calibration=CalibrationConfig(source="self"), offload=True)
    gguf = QuantizeConfig(symmetric=True, group_size=32)
    with pytest.raises(InputError, match="a GGUF file is written from a model in memory: leave out --offload"):
        quantize(source, "out", gguf, format="gguf", offload=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "tokens.npy"}
