"""Hidden states on disk, walks that change nothing, and what comes behind the last block."""

import gc
import importlib
import os
import tempfile
from pathlib import Path

import pytest
import torch
from families import EVERYTHING, FAMILIES, LENGTH, VOCABULARY, Family, for_each, windows
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from trimfit.errors import RunError
from trimfit.models import Block, Placement, Walker, find_blocks
from trimfit.models.states import StateStore

WINDOWS = {"fit": windows(5), "held_out": windows(3, seed=2)}


def grams(walker: Walker, block: Block) -> list[Tensor]:
    groups = walker.groups(block)
    return [gram for name in WINDOWS for gram in walker.grams(block, groups, name)]


def predictions(walker: Walker, name: str, windows: str) -> Tensor:
    """(N, L, V) of a stream, put together from spans."""
    batches: dict[int, list[Tensor]] = {}
    for number, positions in walker.spans(windows):
        batches.setdefault(number, []).append(walker.logits(name, windows, number, positions))
    return torch.cat([torch.cat(parts, dim=1) for parts in batches.values()])


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of five positions in a batch of two windows."""
    monkeypatch.setattr(importlib.import_module("trimfit.models.walk"), "_MOST_PREDICTIONS", 2 * 5 * VOCABULARY)


@pytest.mark.usefixtures("short_spans")
@for_each(EVERYTHING)
@torch.no_grad()
def test_logits_are_those_of_a_plain_forward_pass(family: Family):
    model = family.build()
    walker = Walker(model, find_blocks(model), dict(WINDOWS), 2, to_the_end=True)
    assert len(list(walker)) == len(find_blocks(model))
    for name, tokens in WINDOWS.items():
        assert max(len(positions) for _, positions in walker.spans(name)) in (5, 10)
        found = predictions(walker, name, name)
        torch.testing.assert_close(found, model(input_ids=tokens, use_cache=False).logits)


@torch.no_grad()
def test_a_branch_goes_on_from_the_block_as_it_was():
    """One block without its down projection, the others as they are."""
    model = FAMILIES["llama"].build()
    walker = Walker(model, find_blocks(model), dict(WINDOWS), 2, to_the_end=True)
    weight = model.get_submodule("model.layers.0.mlp.down_proj").get_parameter("weight")
    plain = weight.clone()
    for block in walker:
        if block.index == 0:
            weight.zero_()
            walker.branch(block, "fit", "without")
            weight.copy_(plain)
    expected = {"fit": model(input_ids=WINDOWS["fit"], use_cache=False).logits}
    weight.zero_()
    expected["without"] = model(input_ids=WINDOWS["fit"], use_cache=False).logits
    assert not torch.allclose(expected["fit"], expected["without"])
    for name in expected:
        torch.testing.assert_close(predictions(walker, name, "fit"), expected[name])


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_a_frozen_walk_passes_each_block_once_and_sees_the_same(name: str, monkeypatch: pytest.MonkeyPatch):
    model = FAMILIES[name].build()
    blocks = find_blocks(model)
    plain = Walker(model, blocks, dict(WINDOWS), 2, to_the_end=True)
    expected = [grams(plain, block) for block in plain]
    frozen = Walker(model, blocks, dict(WINDOWS), 2, to_the_end=True, frozen=True)
    passes: list[int] = []
    handles: list[RemovableHandle] = []
    for index, block in enumerate(frozen):
        handles.append(block.module.register_forward_hook(lambda *_, index=index: passes.append(index)))
        for a, b in zip(grams(frozen, block), expected[index], strict=True):
            torch.testing.assert_close(a, b)
    assert passes == [index for index in range(len(blocks)) for _ in range(3 + 2)]  # batches of two windows
    for handle in handles:
        handle.remove()
    for name in WINDOWS:
        torch.testing.assert_close(predictions(frozen, name, name), predictions(plain, name, name))
        assert torch.is_grad_enabled()  # for whoever asks


@pytest.mark.parametrize("dense", [False, True])
def test_hidden_states_on_disk_are_the_same_bit_by_bit(tmp_path: Path, dense: bool):
    model = FAMILIES["llama"].build().to(torch.bfloat16)
    blocks = find_blocks(model)
    in_memory = Walker(model, blocks, dict(WINDOWS), 2, dense=dense)
    expected = [grams(in_memory, block) for block in in_memory]
    window = LENGTH * 32 * 2  # bytes
    placement = Placement(limit=6 * window, folder=tmp_path)
    walker = Walker(model, blocks, dict(WINDOWS), 2, dense=dense, placement=placement)
    for index, block in enumerate(walker):
        streams = 2 if dense and index > 0 else 1  # before the first block they are one
        on_disk = sum(file.stat().st_size for file in tmp_path.iterdir())
        assert (8 * streams - 6) * window <= on_disk < 8 * streams * window
        assert all(torch.equal(a, b) for a, b in zip(grams(walker, block), expected[index], strict=True))
    del walker
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_a_store_without_a_limit_writes_nothing(tmp_path: Path):
    states = torch.randn(2, 3, 4)
    store = StateStore(torch.device("cpu"), None, tmp_path)
    kept = store.keep(states)
    assert kept.get() is states
    assert list(tmp_path.iterdir()) == []


def test_hidden_states_that_cannot_be_written(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    store = StateStore(torch.device("cpu"), 0, tmp_path / "not there")
    with pytest.raises(RunError, match=r"hidden states cannot be written to .*not there .No such file or directory.;"):
        store.keep(torch.zeros(3))
    gc.collect()
    assert capfd.readouterr().err == ""
    full = StateStore(torch.device("cpu"), 0, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "mkstemp", lambda **_: (os.open("/dev/full", os.O_WRONLY), str(tmp_path / "states-1")))
        with pytest.raises(RunError, match="No space left on device"):
            full.keep(torch.zeros(100_000))
