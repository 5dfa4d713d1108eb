"""Reordered inputs leave the function of a model as it is, in every family, and nothing else is reordered."""

from dataclasses import replace

import torch
from families import EVERYTHING, Family, InFloat64, for_each, matrix, windows
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


@for_each(EVERYTHING)
def test_the_function_stays(family: Family):
    model = family.build().double()
    before = logits(model)
    dense = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for block in find_blocks(model):
        orders = find_free_orders(model, block)
        expected = READERS.get(family.name, LLAMA) if family.name in WIRINGS else set()
        assert set(orders) == {f"{block.name}.{name}" for name in expected}
        for seed, (name, order) in enumerate(orders.items()):
            old = matrix(model.get_submodule(name)).clone()
            permutation = order.apply(some_order(order, seed))
            assert torch.equal(matrix(model.get_submodule(name)), old[:, permutation])
            assert not torch.equal(permutation, torch.arange(len(permutation)))
            for layer in order.layers:  # each of them took part: all of their weights are there, in other places
                changed, weight = matrix(layer.module), dense[f"{layer.name}.weight"]
                assert not torch.equal(changed.flatten(), matrix_of(weight, changed).flatten())
                assert torch.equal(changed.flatten().sort().values, weight.flatten().sort().values)
    assert (logits(model) - before).abs().max() <= 1e-10 * before.abs().max()


def matrix_of(weight: Tensor, like: Tensor) -> Tensor:
    """A stored weight as (out, in): GPT-2 keeps the transpose, which here is never square where it matters."""
    return weight if weight.shape == like.shape and weight.stride() == like.stride() else weight.T


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
