"""Every family: all linear layers of every block are quantized, folds are exact, and nothing else changes."""

from functools import partial

import pytest
import torch
from families import EVERYTHING, FAMILIES, Family, for_each, matrix, vision_language_model, windows
from torch import Tensor
from transformers import PreTrainedModel

from trimfit import QuantizeConfig, QuantizeReport, quantize
from trimfit.models import find_blocks, find_folds
from trimfit.pipelines.quantizing.block import BlockWork
from trimfit.quant.pairs import paper_transform

NEAR = 0.03  # of the logits, at 8 bits; without its other half, any fold leaves 0.1 and more


@pytest.fixture(autouse=True)
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the paper's gradient descent, and in `config` for ours: how good they are is not the question here."""
    monkeypatch.setattr("trimfit.pipelines.quantizing.fold_block.paper_transform", partial(paper_transform, steps=20))


def config(transform: str, rounding: str, **options: object) -> QuantizeConfig:
    return QuantizeConfig.model_validate({"transform": transform, "rounding": rounding, "learned_steps": 2, **options})


def folded(model: PreTrainedModel, transform: str) -> set[str]:
    """Names of the norms and biases that may change, as the folds tell."""
    names: set[str] = set()
    for block in find_blocks(model):
        folds = find_folds(model, block.name)
        if transform == "free":
            names |= {f"{scale.norm}.{what}" for scale in folds.inputs for what in ("weight", "bias")}
            names |= {f"{scale.up_layer.name}.bias" for scale in folds.hidden}
        if transform in ("free", "pairs", "paper"):
            names |= {f"{pair.value_layer.name}.bias" for pair in folds.pairs}
    return names


def changed(before: dict[str, Tensor], model: PreTrainedModel) -> set[str]:
    after = model.state_dict()
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


def distance(dense: PreTrainedModel, model: PreTrainedModel) -> float:
    """‖difference‖ / ‖logits‖."""
    with torch.no_grad():
        old, new = (m(input_ids=windows(2)).logits.double() for m in (dense, model))
    return ((new - old).norm() / old.norm()).item()


def check_records(report: QuantizeReport, model: PreTrainedModel, family: Family) -> None:
    blocks = model.config.num_hidden_layers
    names = [f"{family.stack}.{i}.{name}" for i in range(blocks) for group in family.groups for name in group]
    assert sorted(record.name for record in report.layers) == sorted(names)
    assert (report.windows, report.window_length) == (0, 0)
    for record in report.layers:
        assert record.block == int(record.name.removeprefix(f"{family.stack}.").partition(".")[0])
        weight = matrix(model.get_submodule(record.name))
        assert record.shape == tuple(weight.shape)
        assert (record.group_size, record.pruned) == (None, False)
        assert record.zeros == pytest.approx((weight == 0).double().mean().item(), abs=1e-3)
        assert 0 < record.weight_error < 1e-3
        assert record.output_error is None
        assert record.seconds > 0
        assert record.peak_memory > 2**20
    assert (report.online_multiply_adds > 0) == (report.config.transform == "online")


def check_folds(report: QuantizeReport, dense: PreTrainedModel) -> None:
    """Every fold there is was made, but for pairs that "free" may leave as they are, and was recorded."""
    transform = report.config.transform
    done = {what: {r.name for r in report.layers if what in r.transform} for what in ("balance", "pair", "online")}
    folds = [find_folds(dense, block.name) for block in find_blocks(dense)]
    balanced = {name for fold in folds for scale in fold.inputs for name in scale.readers}
    balanced |= {layer.name for fold in folds for scale in fold.hidden for layer in (scale.up_layer, scale.down_layer)}
    paired = {layer.name for fold in folds for pair in fold.pairs for layer in (pair.value_layer, pair.output_layer)}
    assert done["balance"] == (balanced if transform == "free" else set())
    assert done["pair"] <= (paired if transform in ("free", "pairs", "paper") else set())
    if transform in ("pairs", "paper"):
        assert done["pair"] == paired
    assert done["online"] <= ({r.name for r in report.layers} if transform == "online" else set())
    reasons = {reason for fold in folds for reason in fold.refused}
    assert set(report.refused) == (set() if transform == "none" else reasons)


@for_each(EVERYTHING)
def test_all_layers_and_nothing_else(family: Family):
    check(family, "free", "alternating")


@for_each(FAMILIES)
@pytest.mark.parametrize(
    ("transform", "rounding"),
    [
        ("none", "alternating"),
        ("free", "nearest"),
        ("pairs", "alternating"),
        ("online", "alternating"),
        ("paper", "nearest"),
    ],
)
def test_every_transformation(family: Family, transform: str, rounding: str):
    check(family, transform, rounding)


def check(family: Family, transform: str, rounding: str) -> None:
    model, dense = family.build(), family.build()
    report = quantize(model, config(transform, rounding, bits=8, group_size="channel"))
    check_records(report, model, family)
    check_folds(report, dense)
    weights = {f"{record.name}.weight" for record in report.layers}
    assert weights <= changed(dense.state_dict(), model) <= weights | folded(dense, transform)
    assert distance(dense, model) < NEAR
    ties = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (dense, model)]
    assert ties[0] == ties[1]


@for_each(EVERYTHING)
def test_folds_alone_change_nothing_that_is_computed(family: Family):
    """Weights as they are just before they are rounded, with all that was folded into norms and biases."""
    dense = family.build()
    for transform in ("free", "pairs"):
        model = family.build()
        for block in find_blocks(model):
            work = BlockWork(block, find_folds(model, block.name), config(transform, "nearest", bits=2))
            for layer in block.layers:
                layer.write(work.weights[layer.name])
        assert distance(dense, model) < 1e-4


@for_each(FAMILIES)
def test_calibrated(family: Family):
    model, dense = family.build(), family.build()
    report = quantize(model, config("free", "alternating", bits=8, group_size="channel"), windows(4))
    assert (report.windows, report.window_length) == (4, 24)
    assert all(record.output_error is not None for record in report.layers)
    weights = {f"{record.name}.weight" for record in report.layers}
    assert weights <= changed(dense.state_dict(), model) <= weights | folded(dense, "free")
    assert distance(dense, model) < NEAR


def test_the_text_part_of_a_vision_language_model():
    model, dense = vision_language_model(), vision_language_model()
    report = quantize(model, config("none", "nearest"))
    assert len(report.layers) == 4 * 7
    moved = changed(dense.state_dict(), model)
    assert moved == {f"{record.name}.weight" for record in report.layers}
    assert all(name.startswith("model.language_model.layers.") for name in moved)
