"""Reordered inputs leave the function of a model as it is, in every family, and nothing else is reordered."""

from dataclasses import replace

import torch
from families import EVERYTHING, EXPERT_FAMILIES, EXPERTS, Family, InFloat64, for_each, windows
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.models import find_blocks, find_free_orders
from trimfit.models.free_order import FreeOrder
from trimfit.models.wiring import FAMILIES as WIRINGS

READERS = {
    "gpt2": {"attn.c_proj", "mlp.c_proj"},
    "gpt_neox": {"attention.dense", "mlp.dense_4h_to_h"},
    "opt": {"self_attn.out_proj", "fc2"},
    "phi": {"self_attn.dense", "mlp.fc2"},
    "starcoder2": {"self_attn.o_proj", "mlp.c_proj"},
}
LLAMA = {"self_attn.o_proj", "mlp.down_proj"}


def some_order(order: FreeOrder, seed: int) -> Tensor:
    """Another random order for each set."""
    sets, _, r = order.columns.shape
    return torch.rand(sets, r, generator=torch.Generator().manual_seed(seed)).argsort(1)


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    with InFloat64():
        return model(input_ids=windows(3), use_cache=False).logits


@for_each(EVERYTHING | EXPERT_FAMILIES)
def test_the_function_stays(family: Family):
    eager = {"experts_implementation": "eager"} if family.name in EXPERT_FAMILIES else {}  # others have no float64
    model = family.build(**eager).double()
    before = logits(model)
    for block in find_blocks(model):
        orders = find_free_orders(model, block)
        assert set(orders) == {f"{block.name}.{name}" for name in readers(family)}
        for seed, order in enumerate(orders.values()):
            old = [layer.weight.clone() for layer in order.layers]
            permutation = order.apply(some_order(order, seed))
            assert torch.equal(order.reader.weight, old[0][:, permutation])
            for layer, weight in zip(order.layers, old, strict=True):  # all took part, and nothing was lost
                assert not torch.equal(layer.weight, weight)
                assert torch.equal(layer.weight.flatten().sort().values, weight.flatten().sort().values)
    assert (logits(model) - before).abs().max() <= 1e-10 * before.abs().max()


def readers(family: Family) -> set[str]:
    """Names within a block."""
    if family.name not in WIRINGS:
        return set()
    if family.name in EXPERT_FAMILIES:
        return {"self_attn.o_proj", *(f"mlp.experts.{i}.down_proj" for i in range(EXPERTS))}
    return READERS.get(family.name, LLAMA)


def test_layers_that_are_left_out_are_not_touched():
    model = EVERYTHING["llama"].build()
    block = find_blocks(model)[0]

    def found(ignored: str) -> set[str]:
        layers = tuple(layer for layer in block.layers if not layer.name.endswith(ignored))
        return {name.rpartition(".")[2] for name in find_free_orders(model, replace(block, layers=layers))}

    assert found("nothing") == {"o_proj", "down_proj"}
    assert found("v_proj") == found("o_proj") == {"down_proj"}
    assert found("gate_proj") == found("up_proj") == found("down_proj") == {"o_proj"}
    assert found("q_proj") == {"o_proj", "down_proj"}


def test_scores_are_gathered_with_all_copies_of_a_set():
    """Two query heads read each KV head of the tiny Llama, whose heads have 8 dimensions."""
    model = EVERYTHING["llama"].build()
    block = find_blocks(model)[0]
    order = find_free_orders(model, block)[f"{block.name}.self_attn.o_proj"]
    scores = torch.arange(2 * 32).view(2, 32)
    expected = scores.view(2, 2, 2, 8).transpose(0, 1).reshape(2, 4, 8)  # (out, KV head, query head, dimension)
    assert torch.equal(order.scores(scores), expected)
