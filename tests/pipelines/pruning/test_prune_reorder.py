"""For N:M, inputs are reordered first: it helps, it is what a reordered model would give, and it is kept."""

from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from families import EVERYTHING, EXPERT_FAMILIES, FAMILIES, LENGTH, matrix, windows
from pydantic import ValidationError
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trimfit import CalibrationConfig, PruneConfig, prune, prune_checkpoint
from trimfit.masks import NM
from trimfit.models import find_blocks, find_free_orders
from trimfit.pipelines.pruning import reorder as module

TOKENS = windows(32)
BIASED = EVERYTHING["llama-biases"]


def fixed(scores: Tensor, pattern: NM) -> Tensor:
    """A random order that depends on nothing but the width."""
    return torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("capture", ["group", "block"])
@pytest.mark.parametrize("target", ["layer", "dense"])
@pytest.mark.parametrize("name", ["llama-biases", "phi3", "gpt2", "mixtral"])
def test_as_if_the_model_had_come_in_that_order(name: str, target: str, capture: str, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {"pattern": "2:4", "selector": "wanda", "target": target, "capture": capture}
    options["solver"] = "cholesky"  # the end of conjugate gradients depends on the rounding of sums
    monkeypatch.setattr(module, "spread", fixed)
    family = (EVERYTHING | EXPERT_FAMILIES)[name]
    model, expected = family.build(), family.build()
    report = prune(model, TOKENS, PruneConfig(reorder=True, **options))
    for block in find_blocks(expected):
        for order in find_free_orders(expected, block).values():
            sets, _, r = order.columns.shape
            order.apply(fixed(torch.zeros(1, r), NM(2, 4)).expand(sets, r))
    plain = prune(expected, TOKENS, PruneConfig(reorder=False, **options))
    for (where, got), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4, msg=lambda text, where=where: f"{where}: {text}")
    for one, other in zip(report.layers, plain.layers, strict=True):
        assert one.final.calibration == pytest.approx(other.final.calibration, rel=1e-3)


def test_it_lowers_the_errors_of_the_layers_whose_inputs_can_move():
    """And is the default of the selector joint, under a pattern."""
    readers = ("o_proj", "down_proj")
    reports = [
        prune(FAMILIES["llama"].build(), TOKENS, PruneConfig(pattern="2:4", **options))
        for options in ({}, {"reorder": False})
    ]
    errors = [[r.final.calibration for r in report.layers if r.name.endswith(readers)] for report in reports]
    assert all(ours < plain for ours, plain in zip(*errors, strict=True))
    assert sum(errors[0]) < 0.9 * sum(errors[1])


def test_every_group_keeps_its_n():
    model = FAMILIES["llama"].build()
    prune(model, TOKENS, PruneConfig(pattern="2:4"))
    for block in find_blocks(model):
        for layer in block.layers:
            assert ((layer.weight != 0).view(len(layer.weight), -1, 4).sum(2) <= 2).all()


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4", "selector": "wanda"}])
def test_others_stay_as_they_are(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    def never(*arguments: Any) -> Tensor:
        raise AssertionError

    monkeypatch.setattr(module, "spread", never)
    prune(FAMILIES["llama"].build(), windows(4), PruneConfig(**options))


def test_sets_narrower_than_the_pattern_stay():
    """Heads of 8 cannot be filled with groups of 16, hidden units can."""
    model, dense = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    prune(model, TOKENS, PruneConfig(pattern="8:16", selector="magnitude", refit="none", reorder=True))
    for name, stays in {"model.layers.0.self_attn.v_proj": True, "model.layers.0.mlp.up_proj": False}.items():
        weight, old = (matrix(m.get_submodule(name)) for m in (model, dense))
        assert torch.equal(torch.where(weight != 0, old, 0), weight) == stays


def test_reordering_belongs_to_a_pattern():
    with pytest.raises(ValidationError, match="to reorder inputs belongs to an N:M pattern"):
        PruneConfig(sparsity=0.5, reorder=True)


class _Killed(BaseException):
    """Ends a run as nothing in it expects."""


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("capture", ["group", "block"])
def test_what_was_reordered_is_kept(
    tmp_path: Path,
    word_tokenizer: PreTrainedTokenizerFast,
    capture: str,
    offload: bool,
):
    """A run that is ended after o was pruned, which moved the rows of V, goes on to the same model."""
    BIASED.build().save_pretrained(tmp_path / "model")
    word_tokenizer.save_pretrained(tmp_path / "model")
    numpy.save(tmp_path / "tokens.npy", windows(8).numpy())
    calibration = CalibrationConfig(source=str(tmp_path / "tokens.npy"), samples=8, sequence_length=LENGTH)
    config = PruneConfig(pattern="2:4", capture=capture, selector="wanda", reorder=True)

    def start(observer: Any = None) -> None:
        source, out = str(tmp_path / "model"), tmp_path / "out"
        prune_checkpoint(
            source, out, config, calibration, device=torch.device("cpu"), observer=observer, offload=offload
        )

    expected = BIASED.build()
    prune(expected, calibration.windows(word_tokenizer, expected), config)
    for after in (4 + 1, 7 + 4 + 1):  # in the MLP of each block
        with pytest.raises(_Killed):
            start(_Killer(after))
    start()
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected)


class _Killer:
    """Ends a run after so many layers."""

    def __init__(self, after: int):
        self.left = after

    def stage(self, text: str) -> None:
        pass

    def layer(self, record: Any, done: float) -> None:
        self.left -= 1
        if self.left == 0:
            raise _Killed


def assert_same(model: PreTrainedModel, expected: PreTrainedModel) -> None:
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other), name
