"""What is finished of a quantization survives, block by block, and the end is that of a run that nothing disturbed."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import FAMILIES, LENGTH, windows
from transformers import PreTrainedTokenizerFast

from trimfit import CalibrationConfig, InputError, PruneConfig, QuantizeConfig, prune_checkpoint, quantize_checkpoint
from trimfit.pipelines import QuantizedRecord, QuantizeReport, resume
from trimfit.pipelines.quantizing import quantize as quantizing_module

CPU = torch.device("cpu")
CONFIG = QuantizeConfig(bits=3, group_size=8, block_size=8, learned_steps=2)
BLOCKS = 3


class _Killed(BaseException):
    """Ends a run as nothing in it expects."""


class _Killer:
    """Ends the run when the first layer of a block is told of, which is when the block is kept."""

    def __init__(self, block: int) -> None:
        self.block = block

    def stage(self, text: str) -> None:
        pass

    def layer(self, record: QuantizedRecord, done: float) -> None:
        if record.block == self.block:
            raise _Killed


@pytest.fixture
def source(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> Path:
    """With biases in q, k and v, which pairs change, and an online transformation in each block."""
    model = FAMILIES["qwen2"].build(num_hidden_layers=BLOCKS, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size=20_000)
    word_tokenizer.save_pretrained(tmp_path / "model")
    numpy.save(tmp_path / "tokens.npy", windows(6).numpy())
    return tmp_path / "model"


def start(
    source: Path, name: str = "out", killer: _Killer | None = None, *, data: str | None = None, **options: Any
) -> QuantizeReport:
    asked = {"samples": 6, "sequence_length": LENGTH}
    text = {"self": "self", "text": str(source.parent / "tokens.npy")}
    calibration = CalibrationConfig(source=text[data], **asked) if data else None
    config = options.pop("config", CONFIG)
    return quantize_checkpoint(
        str(source), source.parent / name, config, calibration, device=CPU, observer=killer, **options
    )


def kill(source: Path, block: int, **options: Any) -> Path:
    """The run directory of a run that was ended when this block was kept."""
    with pytest.raises(_Killed) as caught:
        start(source, killer=_Killer(block), **options)
    run = source.parent / "out.run"
    assert caught.value.__notes__ == [
        f"what is finished is in {run}: the same command, or trimfit resume {source.parent / 'out'}, goes on"
    ]
    parts = block + 1 if options.get("format") == "dense" else 2 * (block + 1)  # packed levels are apart
    assert len(list(run.glob("part-*.safetensors"))) == parts
    return run


def files(directory: Path) -> dict[str, Any]:
    """All files; `trimfit.json` without times, memory and the name of the run."""
    found: dict[str, Any] = {path.name: path.read_bytes() for path in directory.iterdir()}
    told = json.loads(found["trimfit.json"])
    for part in (told, *told["layers"]):
        del part["seconds"], part["peak_memory"]
    del told["run"], told["stages"]
    return {**found, "trimfit.json": told}


def assert_as_if_nothing_had_happened(source: Path, **options: Any) -> None:
    start(source, "plain", **options)
    assert files(source.parent / "out") == files(source.parent / "plain")
    assert not (source.parent / "out.run").exists()


@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"data": "self"}, {"format": "dense"}, {"format": "dense", "data": "text"}], ids=str
)
def test_ended_behind_each_block(
    source: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], online: bool
) -> None:
    """Blocks that are kept are not done again, and windows that the model wrote are not written again."""
    options = {**options, "config": CONFIG.model_copy(update={"transform": "online" if online else "free"})}
    begun: list[int] = []
    plain = quantizing_module.BlockWork
    monkeypatch.setattr(
        quantizing_module, "BlockWork", lambda block, *rest: begun.append(block.index) or plain(block, *rest)
    )
    with monkeypatch.context() as patch:
        kill(source, 0, **options)
        if options.get("data") == "self":
            patch.setattr("trimfit.calibration.config.sample_from_model", None)  # it has written its windows
        for block in range(1, BLOCKS):
            kill(source, block, **options)
        resume(source.parent / "out")
    assert begun == list(range(BLOCKS))
    assert_as_if_nothing_had_happened(source, **options)


@pytest.mark.parametrize("number", [2, 3], ids=["levels", "state"])
def test_a_damaged_part_is_done_again(source: Path, caplog: pytest.LogCaptureFixture, number: int) -> None:
    """And all behind it, though those are whole."""
    part = kill(source, 2) / f"part-{number:05d}.safetensors"
    part.write_bytes(part.read_bytes()[:-3])
    start(source)
    assert f"{part} is damaged: it is done again, and what came after it" in caplog.text
    assert_as_if_nothing_had_happened(source)


def test_what_differs_is_named_and_nothing_is_touched(source: Path) -> None:
    run = kill(source, 0, data="text")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    with pytest.raises(InputError, match=r"differs in config\.bits \(was 3, is 4\)"):
        start(source, data="text", config=CONFIG.model_copy(update={"bits": 4}))
    with pytest.raises(InputError, match=r"differs in config\.format \(was packed, is dense\)"):
        start(source, data="text", format="dense")
    with pytest.raises(InputError, match=r"differs in calibration\.source \(was /.*, is None\)"):
        start(source)
    with pytest.raises(InputError, match=r"differs in command \(was quantize, is prune\), config\."):
        tokens = CalibrationConfig(source=str(source.parent / "tokens.npy"), samples=6, sequence_length=LENGTH)
        prune_checkpoint(str(source), source.parent / "out", PruneConfig(), tokens, device=CPU)
    numpy.save(source.parent / "tokens.npy", windows(6, seed=5).numpy())
    with pytest.raises(InputError, match=r"the calibration windows are not those with which the run in .* began"):
        resume(source.parent / "out")
    FAMILIES["qwen2"].build(seed=1, num_hidden_layers=BLOCKS).save_pretrained(source, max_shard_size=20_000)
    with pytest.raises(InputError, match=r"differs in model \(was"):
        start(source, data="text")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_finished_run_is_told_again(source: Path) -> None:
    report = start(source, format="dense", data="text")
    again = resume(source.parent / "out.run")
    assert (again.report, again.file_format) == (report, "dense")
    assert again.calibration is not None and again.calibration.source.endswith("tokens.npy")
    start(source, "packed")
    assert (resume(source.parent / "packed").calibration, resume(source.parent / "packed").file_format) == (
        None,
        "packed",
    )
