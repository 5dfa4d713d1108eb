"""A model of which one block at a time is in memory becomes the same checkpoint, byte for byte."""

import json
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from families import EVERYTHING, EXPERT_FAMILIES, LENGTH, windows
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from trimfit import CalibrationConfig, InputError, PruneConfig, PruneReport, prune_checkpoint
from trimfit.checkpoints.shards import read_spans
from trimfit.checkpoints.stream import Stream
from trimfit.models.states import Kept, StateStore

CPU = torch.device("cpu")


def write(
    directory: Path, tokenizer: PreTrainedTokenizerFast, name: str, shard_bytes: int = 20_000, **options: Any
) -> Path:
    (EVERYTHING | EXPERT_FAMILIES)[name].build(**options).save_pretrained(directory, max_shard_size=shard_bytes)
    tokenizer.save_pretrained(directory)
    numpy.save(directory.parent / "tokens.npy", windows(8).numpy())
    return directory


def prune(source: Path, name: str, config: PruneConfig, **options: Any) -> PruneReport:
    calibration = CalibrationConfig(source=str(source.parent / "tokens.npy"), samples=8, sequence_length=LENGTH)
    return prune_checkpoint(str(source), source.parent / name, config, calibration, device=CPU, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {"selector": "wanda"}) for name in ("llama-tied", "qwen2", "gemma3_text", "phi3", "opt", "gpt2")),
        *((name, {"selector": "magnitude", "ignore": ("re:[.]0[.]",)}) for name in ("gemma2", "bloom", "mistral")),
        ("llama", {}),
        ("llama", {"pattern": "2:4", "capture": "block"}),
        ("gpt_neox", {"selector": "magnitude"}),
        *((name, {"selector": "wanda"}) for name in EXPERT_FAMILIES),
        ("mixtral", {"pattern": "2:4"}),
    ],
)
def test_byte_for_byte(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, name: str, options: dict[str, Any]
) -> None:
    dtype = torch.float32 if name == "deepseek_v3" else torch.bfloat16  # its router computes in float32 always
    source = write(tmp_path / "model", word_tokenizer, name, dtype=dtype)
    config = PruneConfig.model_validate(options)
    in_memory = prune(source, "in memory", config)
    offloaded = prune(source, "offloaded", config, offload=True, memory_limit=LENGTH * 32 * 2 * 3)
    files = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("in memory", "offloaded")]
    assert files[0].keys() == files[1].keys()
    assert all(files[0][file] == files[1][file] for file in files[0].keys() - {"trimfit.json"})
    assert len([file for file in files[0] if file.endswith(".safetensors")]) > 1
    for mine, other in zip(in_memory.layers, offloaded.layers, strict=True):
        ignored = {"seconds", "peak_memory"}
        assert mine.model_dump(exclude=ignored) == other.model_dump(exclude=ignored)
    AutoModelForCausalLM.from_pretrained(tmp_path / "offloaded")


class _Killed(BaseException):
    """Ends a run as nothing in it expects."""


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "gpt_neox"])
def test_goes_on_with_what_is_stored_otherwise(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    """Experts one by one, or transposed, and renamed weights, half of them in the result already."""
    source = write(tmp_path / "model", word_tokenizer, name)
    config = PruneConfig(selector="wanda")
    layers = len(prune(source, "whole", config, offload=True).layers)

    class Killer:
        seen = 0

        def stage(self, text: str) -> None: ...

        def layer(self, record: Any, done: float) -> None:
            self.seen += 1
            if self.seen == layers - 1:
                raise _Killed

    with pytest.raises(_Killed):
        prune(source, "out", config, offload=True, observer=Killer())
    assert any((tmp_path / "out.run" / "result").iterdir())
    prune(source, "out", config, offload=True)
    files = [{p.name: p.read_bytes() for p in (tmp_path / d).iterdir()} for d in ("whole", "out")]
    assert files[0].keys() == files[1].keys()
    assert all(files[0][file] == files[1][file] for file in files[0].keys() - {"trimfit.json"})


def test_one_block_at_a_time(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "model", word_tokenizer, "llama")
    plain, inside = Stream.loaded, [0]
    most = 0

    class Watched:
        def __init__(self, context: Any) -> None:
            self.context = context

        def __enter__(self) -> None:
            nonlocal most
            inside[0] += 1
            most = max(most, inside[0])
            self.context.__enter__()

        def __exit__(self, *error: Any) -> None:
            inside[0] -= 1
            self.context.__exit__(*error)

    monkeypatch.setattr(Stream, "loaded", lambda *given, **named: Watched(plain(*given, **named)))
    prune(source, "out", PruneConfig(), offload=True)
    assert (most, inside[0]) == (1, 0)


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system cannot be asked to read ahead")
def test_the_next_block_is_read_ahead(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "model", word_tokenizer, "llama", shard_bytes=10**9)
    asked: set[tuple[int, int]] = set()
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, size, advice: asked.add((start, start + size)))
    prune(source, "out", PruneConfig(selector="magnitude"), offload=True)
    file = source / "model.safetensors"
    spans, tensors = read_spans(file), safetensors.torch.load_file(file)
    assert spans.keys() == tensors.keys()
    data = file.read_bytes()
    for name, (start, end) in spans.items():
        assert data[start:end] == tensors[name].numpy().tobytes()
    assert asked == {span for name, span in spans.items() if name.startswith("model.layers.1.")}


def test_what_cannot_be_offloaded_is_said(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "model", word_tokenizer, "llama", shard_bytes=10**9)
    file = source / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    name = "model.layers.1.mlp.up_proj.weight"
    safetensors.torch.save_file({**tensors, name: tensors[name].bfloat16()}, file, {"format": "pt"})
    with pytest.raises(
        InputError, match=rf"{name} is stored as torch.bfloat16 but the model computes in torch.float32"
    ):
        prune(source, "out", PruneConfig(), offload=True)
    file.unlink()
    torch.save(tensors, source / "pytorch_model.bin")
    with pytest.raises(InputError, match="cannot be offloaded, as its weights are not in safetensors files: leave out"):
        prune(source, "out", PruneConfig(), offload=True)
    calibration = CalibrationConfig(source="self")
    with pytest.raises(InputError, match="a model that is offloaded cannot write its own windows"):
        prune_checkpoint(str(source), tmp_path / "out", PruneConfig(), calibration, device=CPU, offload=True)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "tokens.npy"}


def test_damaged_weights_are_named(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> None:
    source = write(tmp_path / "model", word_tokenizer, "llama")
    name = "model.layers.1.self_attn.k_proj.weight"
    shard = source / json.loads((source / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = safetensors.torch.load_file(shard)
    tensors[name][3, 4] = float("nan")
    safetensors.torch.save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(InputError, match=rf"{name} has NaN or infinite entries"):
        prune(source, "out", PruneConfig(), offload=True)
    assert not (tmp_path / "out.run").exists()


def test_more_blocks_hold_no_more_hidden_states(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the allocation follows a stream for each layer of the model."""
    held, spilled = 0, 0
    count, keep = StateStore.count, StateStore.keep

    def counted(self: StateStore, change: int) -> None:
        nonlocal held
        count(self, change)
        held = max(held, self._bytes)

    def kept(self: StateStore, states: Tensor) -> Kept:
        nonlocal spilled
        before = self._bytes
        found = keep(self, states)
        spilled += states.nbytes if self._bytes == before else 0
        return found

    monkeypatch.setattr(StateStore, "count", counted)
    monkeypatch.setattr(StateStore, "keep", kept)
    stream = 8 * LENGTH * 32 * 2  # bytes of all windows
    outputs: dict[int, list[int]] = {}
    for blocks in (2, 5):
        (tmp_path / str(blocks)).mkdir()
        source = write(
            tmp_path / str(blocks) / "model", word_tokenizer, "llama", num_hidden_layers=blocks, dtype=torch.bfloat16
        )
        found: list[int] = []
        for offload in (True, False):
            held, spilled = 0, 0
            prune(source, f"out-{offload}", PruneConfig(), offload=offload)
            found += [held // stream, spilled > 0]
        outputs[blocks] = found
        assert_same_weights(source.parent)
    assert outputs[2][:2] == outputs[5][:2] == [2, True]  # that of the model in work and that of the dense one
    assert outputs[2][2] < outputs[5][2]
    assert outputs[5][3] == 0


def assert_same_weights(folder: Path) -> None:
    files = [{p.name: p.read_bytes() for p in (folder / f"out-{o}").glob("*.safetensors")} for o in (True, False)]
    assert files[0] == files[1]
    assert len(files[0]) > 1
