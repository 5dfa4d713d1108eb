"""Layers that lose no weight: refitted towards the dense model's activations, or left as they are."""

from pathlib import Path

import pytest
import torch
from families import FAMILIES, plain_inputs, windows
from torch import Tensor
from transformers import PreTrainedModel

from trimfit import CalibrationConfig, InputError, PruneConfig, load_checkpoint, prune
from trimfit.demo.run import model_path
from trimfit.pipelines import prune_checkpoint

TOKENS = windows(16)
DOWN = "model.layers.1.mlp.down_proj"


def inputs_of(model: PreTrainedModel, name: str) -> Tensor:
    """(tokens, n) float64, of the windows."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        model(TOKENS)
    hook.remove()
    return seen[0].flatten(0, 1).double()


def test_refitted_to_the_optimum_for_what_was_pruned_before_it():
    model, dense = FAMILIES["llama"].build().double(), FAMILIES["llama"].build().double()
    config = PruneConfig(keep_dense=("down_proj",), held_out=0, damping=0.05, dense_share=0.7, tolerance=1e-8)
    report = prune(model, TOKENS, config)
    x, x_dense = (inputs_of(m, DOWN) for m in (model, dense))
    r, r_dense = (inputs_of(m, "model.layers.1.post_attention_layernorm") for m in (model, dense))
    weight = dense.get_submodule(DOWN).get_parameter("weight").detach()
    gram = x.T @ x / len(x)
    gram += 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
    missing = (x_dense - x) @ weight.T + r_dense - r
    expected = weight + 0.7 * torch.linalg.solve(gram, x.T @ missing / len(x)).T
    found = model.get_submodule(DOWN).get_parameter("weight").detach()
    assert (expected - weight).norm() > 1e-2 * weight.norm()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * weight.abs().max().item())
    record = next(record for record in report.layers if record.name == DOWN)
    assert (record.sparsity, record.accepted) == (0, "optimal")


def test_left_as_it_is_with_the_target_layer():
    model, dense = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    report = prune(model, TOKENS, PruneConfig(keep_dense=("down_proj",), target="layer"))
    assert torch.equal(
        model.get_submodule(DOWN).get_parameter("weight"), dense.get_submodule(DOWN).get_parameter("weight")
    )
    assert {record.accepted for record in report.layers if "down" in record.name} == {"none"}


def test_rows_of_what_is_left_as_it_is_were_not_weighed():
    report = prune(FAMILIES["llama"].build(), TOKENS, PruneConfig(keep_dense=("q_proj",), target="layer"))
    rows = {record.name.rpartition(".")[2]: record.rows for record in report.layers}
    assert (rows["q_proj"], rows["k_proj"]) == ("equal", "attention")


def test_inputs_that_calibration_never_excites_keep_their_weights():
    model, dense = FAMILIES["opt"].build(), FAMILIES["opt"].build()
    name = "model.decoder.layers.1.fc2"
    report = prune(model, TOKENS, PruneConfig(keep_dense=("fc2",), held_out=0))
    dead = (plain_inputs(model, TOKENS, [name])[name] == 0).all(0)
    found, weight = (m.get_submodule(name).get_parameter("weight").detach() for m in (model, dense))
    assert dead.any() and next(record.accepted for record in report.layers if record.name == name) == "optimal"
    assert torch.equal(found[:, dead], weight[:, dead]) and not torch.equal(found, weight)


def test_the_others_lose_what_was_asked_for():
    model = FAMILIES["llama"].build()
    report = prune(model, TOKENS, PruneConfig(sparsity=0.6, keep_dense=("down_proj", "re:layers.0.*q_proj")))
    kept = [record for record in report.layers if "down" in record.name or "0.self_attn.q" in record.name]
    assert {record.sparsity for record in kept} == {0}
    losing = [record for record in report.layers if record not in kept]
    weights = sum(record.shape[0] * record.shape[1] for record in losing)
    assert sum(round(r.sparsity * r.shape[0] * r.shape[1]) for r in losing) == round(0.6 * weights)
    assert report.allocation is not None and sum(block.weights for block in report.allocation) == weights


def test_a_pattern_need_not_divide_them():
    model = FAMILIES["llama"].build(intermediate_size=44)
    with pytest.raises(InputError, match=r"of 8 for .* 1 more layers; .* \(--keep-dense '\*down_proj'\)"):
        prune(model, TOKENS, PruneConfig(pattern="4:8"))
    report = prune(model, TOKENS, PruneConfig(pattern="4:8", keep_dense=("down_proj",)))
    assert {record.sparsity for record in report.layers} == {0, 0.5}


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        (("x",), "the keep-dense pattern 'x' matches no linear layer"),
        (("*",), "the keep-dense patterns leave no layer"),
    ],
)
def test_wrong_patterns(patterns: tuple[str, ...], words: str):
    model, dense = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    with pytest.raises(InputError, match=words):
        prune(model, TOKENS, PruneConfig(keep_dense=patterns))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))


def test_a_trained_model_is_nearer_to_the_dense_one(tmp_path: Path):
    """Than with the same layers ignored."""
    dense = load_checkpoint(str(model_path()))
    calibration = CalibrationConfig(samples=64, sequence_length=128)
    held_out = CalibrationConfig(samples=16, sequence_length=128, seed=1).windows(dense.tokenizer, dense.model)
    goal = torch.log_softmax(dense.model(held_out).logits.float(), -1).detach()
    divergence: dict[str, float] = {}
    for option in ("ignore", "keep_dense"):
        config = PruneConfig.model_validate({"selector": "wanda", "sparsity": 0.7, option: ("down_proj",)})
        prune_checkpoint(str(model_path()), tmp_path / option, config, calibration, device=torch.device("cpu"))
        pruned = load_checkpoint(str(tmp_path / option)).model
        logits = torch.log_softmax(pruned(held_out).logits.float(), -1).detach()
        divergence[option] = (goal.exp() * (goal - logits)).sum(-1).mean().item()
    assert divergence["keep_dense"] < 0.9 * divergence["ignore"]
