"""Gram matrices stream: what is held is one block's hidden states and the Gram matrices of one group."""

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from families import FAMILIES, LENGTH, windows
from torch import Tensor

from trimfit import FactoredGram, PruneConfig, prune
from trimfit.calibration import InputMoments
from trimfit.models import Block, Group, Walker
from trimfit.pipelines.pruning.records import LayerRecord


@pytest.fixture(autouse=True)
def only_what_is_new() -> Iterator[None]:
    """The collector looks at nothing older than the test, which makes it a hundred times faster."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def live_bytes() -> int:
    """Of all tensors that the test made and Python still knows; those that share memory count once."""
    gc.collect()
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


class _Watcher:
    """Notes the live bytes after each layer."""

    def __init__(self) -> None:
        self.bytes: list[int] = []

    def stage(self, text: str) -> None:
        pass

    def layer(self, record: LayerRecord, done: float) -> None:
        self.bytes.append(live_bytes())


@pytest.mark.parametrize(
    ("capture", "target", "streams"),
    [
        ("group", "layer", {1}),
        ("block", "layer", {1}),
        ("group", "dense", {1, 2}),  # they are one until the dense stream has gone through the first block
        ("block", "dense", {2}),
    ],
)
def test_more_windows_hold_more_hidden_states_and_nothing_else(capture: str, target: str, streams: set[int]):
    options = {"selector": "wanda", "capture": capture, "target": target, "batch_size": 2, "held_out": 0.25}
    config = PruneConfig.model_validate(options)

    def watch(count: int) -> list[int]:
        watcher = _Watcher()
        model, tokens = FAMILIES["llama"].build(), windows(count)
        before = live_bytes()
        prune(model, tokens, config, observer=watcher)
        return [bytes - before for bytes in watcher.bytes]

    watch(8)  # what is made once
    few, many = watch(8), watch(16)
    assert len(few) == 2 * 7
    assert {b - a for a, b in zip(few, many, strict=True)} == {n * 8 * LENGTH * 32 * 4 for n in streams}


@pytest.mark.parametrize("refit", ["none", "own", "optimal"])
def test_one_group_at_a_time(monkeypatch: pytest.MonkeyPatch, refit: str):
    """No Gram matrix outlives its group: none is left when the next are summed."""
    plain = Walker.moments
    left: list[int] = []

    def moments(self: Walker, block: Block, groups: Sequence[Group], name: str) -> list[InputMoments]:
        assert len(groups) == 1
        left.append(sum(type(item) is FactoredGram for item in gc.get_objects()))
        return plain(self, block, groups, name)

    monkeypatch.setattr(Walker, "moments", moments)
    prune(FAMILIES["llama"].build(), windows(4), PruneConfig.model_validate({"selector": "sparsegpt", "refit": refit}))
    assert left == [0] * (2 * 4 * 2)  # blocks, groups, sets of windows


@pytest.mark.parametrize(("selector", "walks"), [("sparsegpt", 1), ("joint", 2)])  # one more to measure costs
def test_one_gram_matrix_in_float64_serves_a_group(monkeypatch: pytest.MonkeyPatch, selector: str, walks: int):
    made: list[int] = []
    plain = FactoredGram.__init__

    def init(self: FactoredGram, *arguments: Any, **keywords: Any) -> None:
        made.append(1)
        plain(self, *arguments, **keywords)

    monkeypatch.setattr(FactoredGram, "__init__", init)
    prune(FAMILIES["llama"].build(), windows(8), PruneConfig(selector=selector))
    assert len(made) == walks * 2 * 4
    assert torch.is_grad_enabled()
