"""What `allocate` measures, against plain forward passes of tiny models."""

import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, EXPERT_FAMILIES, FAMILIES, LENGTH, Family, for_each, matrix, plain_grams, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.masks.allocation import STEPS
from trimfit.models import Block, Walker, find_blocks, select_layers
from trimfit.pipelines.pruning.allocate import Allocation, AllocationName, allocate, measure
from trimfit.pipelines.pruning.sensitivity import TOKENS as LOOKED_AT
from trimfit.pipelines.pruning.sensitivity import Probe, looked_at
from trimfit.refit import FactoredGram

TOKENS = windows(4)


def run(family: Family, method: AllocationName, sparsity: float = 0.6, ignore: tuple[str, ...] = ()) -> Allocation:
    model = family.build()
    blocks = select_layers(model, find_blocks(model), ignore)
    measured = measure(model, blocks, TOKENS, method=method, batch_size=2)
    return allocate(blocks, measured, method=method, sparsity=sparsity)


def sensitivities(model: PreTrainedModel, blocks: Sequence[Block], tokens: Tensor) -> dict[str, float]:
    walker = Walker(model, blocks, {"few": looked_at(tokens)}, to_the_end=True)
    probe = Probe(walker, "few")
    for block in walker:
        probe.disturb(block)
    return probe.sensitivities()


@for_each({name: ALL_FAMILIES[name] for name in (*FAMILIES, "cohere", "gptj")})
@pytest.mark.parametrize("method", ["owl", "error"])
def test_totals_are_exact_and_the_model_is_left_alone(family: Family, method: AllocationName):
    model = family.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blocks = find_blocks(model)
    measured = measure(model, blocks, TOKENS, method=method, batch_size=2)
    allocation = allocate(blocks, measured, method=method, sparsity=0.6)
    sizes = {layer.name: layer.weight.numel() for block in blocks for layer in block.layers}
    assert allocation.pruned.keys() == sizes.keys()
    assert sum(allocation.pruned.values()) == round(0.6 * sum(sizes.values()))
    assert all(abs(allocation.pruned[name] / size - 0.6) < 0.17 for name, size in sizes.items())
    assert len({allocation.pruned[name] / sizes[name] for name in sizes}) > 1
    for block, budget in zip(blocks, allocation.blocks, strict=True):
        assert budget.weights == sum(sizes[layer.name] for layer in block.layers)
        assert budget.pruned == sum(allocation.pruned[layer.name] for layer in block.layers)
        assert (budget.outliers is None, budget.cost is None) == (method == "error", method == "owl")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_uniform_needs_no_pass():
    model = FAMILIES["llama"].build()
    blocks = find_blocks(model)
    measured = measure(model, blocks, torch.empty(0, 8), method="uniform")
    allocation = allocate(blocks, measured, method="uniform", sparsity=0.5)
    assert all(2 * allocation.pruned[layer.name] == layer.weight.numel() for block in blocks for layer in block.layers)
    assert [budget.sparsity for budget in allocation.blocks] == [0.5, 0.5]


def test_outlier_ratios_are_those_of_a_plain_pass():
    allocation = run(FAMILIES["llama"], "owl")
    model = FAMILIES["llama"].build()
    for budget in allocation.blocks:
        names = [f"model.layers.{budget.block}.{layer}" for layer in FAMILIES["llama"].layers]
        grams = plain_grams(model, TOKENS, names)
        scores = torch.cat(
            [
                (matrix(model.get_submodule(name)).abs() * grams[name].diagonal().sqrt()).flatten().double()
                for name in names
            ]
        )
        assert budget.outliers == pytest.approx((scores > 5 * scores.mean()).double().mean().item(), abs=1e-9)
        assert budget.outliers > 0


def test_blocks_with_more_outliers_lose_less():
    first, second = run(FAMILIES["llama"], "owl").blocks
    assert first.outliers is not None and second.outliers is not None
    assert (first.sparsity < second.sparsity) == (first.outliers > second.outliers)
    assert abs(first.sparsity - second.sparsity) == pytest.approx(0.16, abs=1e-3)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_one_factorised_matrix_is_in_memory_at_a_time(monkeypatch: pytest.MonkeyPatch, name: str):
    """However many experts there are."""
    made: list[weakref.ref[FactoredGram]] = []

    def watched(*arguments: Any) -> FactoredGram:
        assert not any(one() for one in made)
        gram = FactoredGram(*arguments)
        made.append(weakref.ref(gram))
        return gram

    monkeypatch.setattr("trimfit.pipelines.pruning.allocate.FactoredGram", watched)
    run((FAMILIES | EXPERT_FAMILIES)[name], "error")
    assert len(made) == 2 * {"llama": 4, "mixtral": 2 + 4 + 4}[name]


def test_ignored_layers_have_no_budget():
    for method in ("owl", "error"):
        allocation = run(FAMILIES["llama"], method, ignore=("model.layers.0.*", "down_proj"))
        assert [budget.block for budget in allocation.blocks] == [1]
        assert not any("layers.0" in name or "down_proj" in name for name in allocation.pruned)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_sensitivities_are_those_of_changes_in_the_output(name: str):
    """The mean over every output at every token, changed on its own: what white noise comes to on average."""
    model = FAMILIES[name].build()
    blocks = find_blocks(model)
    tokens = windows(12)[:, :12]
    layer = next(layer for layer in blocks[0].layers if layer.name.endswith(("o_proj", "attn.c_proj")))
    found = sensitivities(model, blocks, tokens)[layer.name]
    size = 0.01
    costs = []
    for position in range(tokens.shape[1]):
        for unit in range(layer.weight.shape[0]):
            change = torch.zeros(tokens.shape[1], layer.weight.shape[0])
            change[position, unit] = size  # in all windows at once, which do not see each other
            costs.append(_divergence(model, layer.module, tokens, change) / len(tokens))
    assert found == pytest.approx(sum(costs) / len(costs) / size**2, rel=0.3)


@torch.no_grad()
def _divergence(model: nn.Module, module: nn.Module, tokens: torch.Tensor, change: torch.Tensor) -> float:
    plain = model(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
    handle = module.register_forward_hook(lambda module, arguments, output: output + change)
    other = model(input_ids=tokens, use_cache=False).logits.double().log_softmax(-1)
    handle.remove()
    return (plain.exp() * (plain - other)).sum().item()


def test_the_cost_of_a_block_is_that_of_its_layers_alone():
    """The whole budget in one layer: its sensitivity times its summed losses, from a plain inverse."""
    model = FAMILIES["llama"].build()
    ignore = ("re:layers.1", "re:(q|k|v|gate|up|down)_proj")
    blocks = select_layers(model, find_blocks(model), ignore)
    name = "model.layers.0.self_attn.o_proj"
    measured = measure(model, blocks, TOKENS, method="error")
    budget = allocate(blocks, measured, method="error", sparsity=0.5).blocks[0]
    gram = plain_grams(model, TOKENS, [name])[name]
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    losses = (matrix(model.get_submodule(name)).double().square() / damped.inverse().diagonal()).flatten().sort().values
    sensitivity = sensitivities(model, blocks, TOKENS)[name]
    assert len(losses) % STEPS != 0
    assert budget.cost == pytest.approx(losses[: len(losses) // 2].sum().item() * sensitivity, rel=1e-3)


def test_only_so_many_tokens_are_looked_at():
    model = FAMILIES["llama"].build()
    blocks = find_blocks(model)
    enough = LOOKED_AT // LENGTH
    many = windows(enough + 1)
    assert sensitivities(model, blocks, many) == sensitivities(model, blocks, many[:enough])
    assert sensitivities(model, blocks, many) != sensitivities(model, blocks, many[1:])
