"""Rows of Q and K that are refitted together, on the trained demo model: what comes of it is what it is for."""

import pytest
import torch
from torch import Tensor

import trimfit
from trimfit import PruneConfig
from trimfit.calibration import CalibrationConfig
from trimfit.demo.run import model_path
from trimfit.models import find_blocks, find_query_key

OTHERS = ("*v_proj", "*o_proj", "*mlp*")


def pruned(row_weights: str, windows: Tensor, held_out: Tensor, **options: object) -> tuple[float, trimfit.PruneReport]:
    """Divergence of the predictions for other windows from those of the dense model, nats; and the report."""
    checkpoint = trimfit.load_checkpoint(str(model_path()))
    model = checkpoint.model.float()
    with torch.no_grad():
        dense = model(held_out).logits.log_softmax(-1)
        report = trimfit.prune(
            model, windows, PruneConfig.model_validate({"ignore": OTHERS, "row_weights": row_weights, **options})
        )
        after = model(held_out).logits.log_softmax(-1)
    return (dense.exp() * (dense - after)).sum(-1).mean().item(), report


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    checkpoint = trimfit.load_checkpoint(str(model_path()))
    config = CalibrationConfig(source="demo", samples=24, sequence_length=128, seed=3)
    return config.windows(checkpoint.tokenizer, checkpoint.model)


@pytest.mark.parametrize("options", [{"pattern": "2:4"}, {"sparsity": 0.6, "allocation": "uniform"}])
def test_predictions_are_nearer_to_the_dense_model(options: dict[str, object], tokens: Tensor):
    fit, other = tokens[:16], tokens[16:]
    equal, _ = pruned("equal", fit, other, **options)
    attention, report = pruned("attention", fit, other, **options)
    assert attention < 0.8 * equal
    assert {record.name.rpartition(".")[2] for record in report.layers} == {"q_proj", "k_proj"}


def test_the_certificate_is_of_whole_heads(tokens: Tensor):
    _, report = pruned("attention", tokens[:16], tokens[16:], pattern="2:4", selector="wanda")
    assert all(record.status == "optimal" and record.solver == "ConjugateGradients" for record in report.layers)
    assert all(record.certificate is not None and record.certificate <= 1e-4 for record in report.layers)


def test_wanda_and_the_target_of_the_paper_take_it_too(tokens: Tensor):
    fit, other = tokens[:16], tokens[16:]
    plain = {"selector": "wanda", "target": "layer", "pattern": "2:4"}
    assert pruned("attention", fit, other, **plain)[0] < pruned("equal", fit, other, **plain)[0]


def test_the_demo_model_has_such_pairs():
    """Or all of this would test nothing."""
    model = trimfit.load_checkpoint(str(model_path())).model
    assert all(find_query_key(model, block) is not None for block in find_blocks(model))
