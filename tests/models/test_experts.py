"""Experts that share one parameter are found as layers of their own, and seen one by one on the tokens they get."""

from contextlib import nullcontext

import pytest
import torch
from families import EXPERT_FAMILIES, EXPERTS, Family, for_each, plain_expert_inputs, plain_grams, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.errors import InputError
from trimfit.models import Block, Layer, Walker, find_blocks, select_layers, walk
from trimfit.models.experts import ExpertLinear, each_called, matched

LAST = 1  # the block that has experts in every family


def names(block: Block) -> set[str]:
    return {layer.name.removeprefix(f"{block.name}.") for layer in block.layers}


def experts_of(block: Block) -> list[Layer]:
    return [layer for layer in block.layers if isinstance(layer.module, ExpertLinear)]


def holder(block: Block) -> str:
    """Name of the module that holds the experts."""
    return experts_of(block)[0].name.rsplit(".", 2)[0]


def parameter(model: PreTrainedModel, layer: Layer) -> Tensor:
    """W (out, in) of an expert, written independently of the library."""
    owner, expert, name = layer.name.rsplit(".", 2)
    weight = model.get_parameter(f"{owner}.{name}").detach()[int(expert)]
    return weight.T if model.config.model_type == "gpt_oss" else weight


def silence(model: PreTrainedModel, expert: int) -> None:
    """GPT-OSS: no token is routed to this expert."""
    for block in range(model.config.num_hidden_layers):
        model.get_parameter(f"model.layers.{block}.mlp.router.bias").data[expert] = -1e4


@for_each(EXPERT_FAMILIES)
def test_layers_are_those_of_attention_and_of_each_expert_and_no_router(family: Family):
    model = family.build()
    block = find_blocks(model)[LAST]
    assert names(block) == family.layers
    assert len(block.layers) == len(family.layers)
    for layer in experts_of(block):
        assert torch.equal(layer.weight, parameter(model, layer))
        assert model.get_parameter(layer.parameter).dim() == 3


def test_a_router_that_is_a_linear_layer_stays_dense():
    """Alone or deep in a part of its own, by its outputs; a layer of the same shape in a larger part is none."""
    model = EXPERT_FAMILIES["mixtral"].build()
    mlp = model.get_submodule("model.layers.1.mlp")
    mlp.router = nn.Linear(32, EXPERTS)
    mlp.deeper = nn.ModuleDict({"wg": nn.Linear(32, EXPERTS), "weigh": nn.Linear(32, 1)})
    mlp.other = nn.ModuleDict({"narrow": nn.Linear(32, EXPERTS), "wide": nn.Linear(EXPERTS, 32)})
    found = names(find_blocks(model)[1])
    assert found == EXPERT_FAMILIES["mixtral"].layers | {"mlp.other.narrow", "mlp.other.wide"}


@for_each(EXPERT_FAMILIES)
@torch.no_grad()
def test_writing_changes_one_slice_and_nothing_else(family: Family):
    model, dense = family.build(), family.build().state_dict()
    layer = experts_of(find_blocks(model)[LAST])[2]
    layer.write(torch.ones(layer.weight.shape))
    assert torch.equal(parameter(model, layer), torch.ones(layer.weight.shape))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, dense[name])}
    assert changed == {layer.parameter}
    others = [i for i in range(EXPERTS) if i != 2]
    assert torch.equal(model.get_parameter(layer.parameter)[others], dense[layer.parameter][others])


def test_a_copy_of_a_block_has_its_own_experts():
    block = find_blocks(EXPERT_FAMILIES["mixtral"].build())[0]
    before, copy = [layer.weight.clone() for layer in block.layers], block.copy()
    for layer in copy.layers:
        layer.write(torch.zeros(layer.weight.shape))
    assert [layer.name for layer in copy.layers] == [layer.name for layer in block.layers]
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(block.layers, before, strict=True))


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@for_each(EXPERT_FAMILIES)
@torch.no_grad()
def test_called_one_by_one_experts_give_the_same(family: Family, implementation: str):
    model = family.build(experts_implementation=implementation)
    expected = model(input_ids=windows(3), use_cache=False).logits
    linears = [layer.module for block in find_blocks(model) for layer in experts_of(block)]
    calls: list[int] = []
    for linear in linears:
        linear.register_forward_pre_hook(lambda module, arguments: calls.append(len(arguments[0])))
    with each_called(linears):  # type: ignore[arg-type]
        given = model(input_ids=windows(3), use_cache=False).logits
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == len(linears)  # also those without a token
    again = model(input_ids=windows(3), use_cache=False).logits
    assert torch.equal(again, expected) and len(calls) == len(linears)  # as if nothing had been


@for_each(EXPERT_FAMILIES)
def test_gram_matrices_are_those_of_the_tokens_routed_to_each_expert(family: Family):
    model, tokens = family.build(), windows(5)
    walker = Walker(model, find_blocks(model), {"fit": tokens}, batch_size=2)
    for block in walker:
        groups = walker.groups(block)
        if block.index < LAST:
            continue
        found = [tuple(layer.name.removeprefix(f"{block.name}.") for layer in group.layers) for group in groups]
        assert tuple(found) == family.groups
        inputs = plain_expert_inputs(model, tokens, holder(block))
        assert sum(len(inputs[f"{holder(block)}.{i}.down_proj"]) for i in range(EXPERTS)) == 2 * tokens.numel()
        plain = plain_grams(model, tokens, [g.layers[0].name for g in groups if not g.is_expert])
        for group, moments in zip(groups, walker.moments(block, groups, "fit"), strict=True):
            name = group.layers[0].name
            x = inputs.get(name)
            expected = plain[name] if x is None else x.T @ x / max(1, len(x))
            assert moments.tokens == (tokens.numel() if x is None else len(x))
            assert (moments.gram.double() - expected).abs().max() <= 1e-5 * max(expected.diagonal().max().item(), 1e-9)


def test_an_expert_without_tokens_has_none():
    model = EXPERT_FAMILIES["gpt_oss"].build()
    for expert in (1, 3):  # two: inputs without entries all lie at the same place
        silence(model, expert)
    walker = Walker(model, find_blocks(model), {"fit": windows(3)}, dense=True)
    for block in walker:
        groups = [group for group in walker.groups(block) if group.is_expert]
        for group, moments in zip(groups, walker.moments(block, groups, "fit"), strict=True):
            silent = any(f".experts.{expert}." in group.layers[0].name for expert in (1, 3))
            assert len(group.layers) == 1
            assert (moments.tokens == 0) == silent
            assert bool((moments.gram == 0).all()) == silent


def test_a_capture_that_sees_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """Hooks on experts that a forward pass multiplies by all at once are never called."""
    monkeypatch.setattr(walk, "each_called", lambda linears: nullcontext())
    model = EXPERT_FAMILIES["mixtral"].build()
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.experts\.0\.gate_up_proj receives no input"):
        next(iter(Walker(model, find_blocks(model), {"fit": windows(2)})))


def test_experts_that_compute_something_else_are_refused():
    model = EXPERT_FAMILIES["mixtral"].build(experts_implementation="eager")
    experts = model.get_submodule("model.layers.1.mlp.experts")
    plain = experts.forward
    experts.forward = lambda *arguments: 1.5 * plain(*arguments)  # type: ignore[method-assign]
    with pytest.raises(InputError, match=r"the experts in model\.layers\.1 do not give what they should"):
        next(iter(Walker(model, find_blocks(model), {"fit": windows(2)})))


def test_drift_compares_the_same_tokens():
    """After routing has changed: X − X̃ for tokens that the dense model gives to the same expert, 0 for the others."""
    model, dense, tokens = (*(EXPERT_FAMILIES["mixtral"].build() for _ in range(2)), windows(4))
    walker = Walker(model, find_blocks(model), {"fit": tokens}, batch_size=4, dense=True)
    for block in walker:
        if block.index == 0:
            for layer in block.layers:
                layer.write(layer.weight * (layer.weight.abs() > 0.05))
    block = walker.blocks[1]
    groups = [group for group in walker.groups(block) if group.is_expert]
    routed, dense_routed = routing(model, tokens), routing(dense, tokens)
    assert not torch.equal(routed, dense_routed)
    inputs, dense_inputs = (plain_expert_inputs(m, tokens, holder(block)) for m in (model, dense))
    for group, moments in zip(groups, walker.moments(block, groups, "fit"), strict=True):
        name = group.layers[0].name
        expert = int(name.split(".")[-2])
        mine, other = ((chosen == expert).any(1) for chosen in (routed, dense_routed))
        x, same = inputs[name], inputs[name].clone()
        same[other[mine]] = dense_inputs[name][mine[other]]
        assert moments.drift is not None and moments.drift.inputs is not None
        expected = (x - same).T @ x / len(x)
        assert expected.abs().max() > 1e-4
        assert (moments.drift.inputs.double() - expected).abs().max() <= 1e-4 * expected.abs().max()


@torch.no_grad()
def routing(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """(tokens, 2) experts of each token in the last block."""
    caught: list[Tensor] = []
    handle = model.get_submodule("model.layers.1.mlp.experts").register_forward_pre_hook(
        lambda module, arguments: caught.append(arguments[1])
    )
    model(input_ids=tokens, use_cache=False)
    handle.remove()
    return caught[0]


def test_matched_takes_its_own_inputs_where_the_others_have_none():
    mine, others = torch.arange(6.0).view(3, 2), -torch.arange(1.0, 5.0).view(2, 2)
    given = matched(mine, torch.tensor([2, 5, 7]), others, torch.tensor([5, 6]))
    assert given.tolist() == [[0.0, 1.0], [-1.0, -2.0], [4.0, 5.0]]


def test_experts_can_be_ignored_by_name():
    model = EXPERT_FAMILIES["mixtral"].build()
    blocks = select_layers(model, find_blocks(model), ["experts.2.*", "re:layers.0.*gate_up"])
    left = {layer.name for block in blocks for layer in experts_of(block)}
    assert left == {
        *(f"model.layers.0.mlp.experts.{i}.down_proj" for i in (0, 1, 3)),
        *(f"model.layers.1.mlp.experts.{i}.{name}" for i in (0, 1, 3) for name in ("gate_up_proj", "down_proj")),
    }
    assert select_layers(model, blocks, ["experts.2.*"]) == blocks  # they are known, though left out already
    walker = Walker(model, blocks, {"fit": windows(2)})
    for block in walker:  # those that are left are seen all the same
        assert {layer.name for group in walker.groups(block) if group.is_expert for layer in group.layers} <= left
