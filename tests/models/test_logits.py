"""The curvature of attention logits, against the divergence that small errors in the outputs of Q and K make."""

from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, EXPERT_FAMILIES, FAMILIES, LENGTH, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.models import Walker, find_blocks, find_query_key, logits
from trimfit.models.hooks import after
from trimfit.models.logits import LogitCurvature
from trimfit.ranks import ALONE

TOKENS = windows(4)
MANY = TOKENS.repeat(64, 1)  # draws for the same tokens

# Rotated, with norms of Q and K, with a cap on the logits and local attention, not rotated, with sinks.
NAMES = ["llama", "qwen3", "gemma2", "opt", "olmo2", "gpt_oss"]


def curvatures(model: PreTrainedModel, tokens: Tensor, **more: Any) -> list[dict[str, Tensor]]:
    """Of each block, by the last part of a layer's name."""
    walker = Walker(model, find_blocks(model), {"fit": tokens}, **more)
    found: list[dict[str, Tensor]] = []
    for block in walker:
        pair = find_query_key(model, block)
        assert pair is not None
        told = walker.logit_curvature(block, pair, "fit", tokens.numel())
        found.append({name.rpartition(".")[2]: metric for name, metric in told.items()})
    return found


def attention(model: PreTrainedModel, block: int) -> Tensor:
    """(B, heads, L, L + 1) float64 weights, with what is left for a sink."""
    weights = model(TOKENS, output_attentions=True, use_cache=False).attentions[block].double()
    return torch.cat([weights, (1 - weights.sum(-1, keepdim=True)).clamp_min(0)], -1)


def divergence(model: PreTrainedModel, block: int, layer: nn.Module, error: Tensor) -> float:
    """KL of a block's attention, summed over heads, for each token, where an error is added to a layer's output."""

    def add(sign: int) -> Tensor:
        with after([(layer, lambda module, arguments, output: output + (sign * error).to(output.dtype))]):
            return attention(model, block)

    plain = attention(model, block)
    ratios = [plain / add(sign).clamp_min(1e-30) for sign in (1, -1)]
    both = [torch.where(plain > 1e-12, plain * ratio.log(), 0).sum() for ratio in ratios]
    return (both[0] + both[1]).item() / 2 / TOKENS.numel()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_it_is_the_divergence_that_small_errors_make(name: str):
    model = (ALL_FAMILIES | EXPERT_FAMILIES)[name].build()
    told = curvatures(model, MANY)
    if name != "gpt_oss":  # whose experts have no float64
        model = model.double()
    model.set_attn_implementation("eager")
    for number, block in enumerate(find_blocks(model)):
        pair = find_query_key(model, block)
        assert pair is not None
        query, key = told[number]["q_proj"], told[number]["k_proj"]
        size = query.shape[1]
        for seed, head in enumerate(range(len(query))):
            error = torch.zeros(len(query), size, dtype=torch.float64)
            error[head] = 0.02 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            expected = error[head] @ query[head] @ error[head] / 2
            found = divergence(model, number, pair.query.module, error.flatten())
            assert found == pytest.approx(expected.item(), rel=0.25)
        error = 0.02 * torch.randn(len(key), size, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        expected = torch.einsum("hd,hde,he->", error, key, error) / 2
        found = 0.0  # errors of one key at a time: those of several would not simply add up
        for place in range(LENGTH):
            there = torch.zeros(1, LENGTH, 1, dtype=torch.float64)
            there[:, place] = 1
            found += divergence(model, number, pair.key.module, error.flatten() * there)
        assert found == pytest.approx(expected.item(), rel=0.25)


def test_nothing_is_left_behind():
    """Neither in the model nor in transformers; and the same windows tell the same again."""
    model = FAMILIES["llama"].build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    own = model.config._attn_implementation
    first, second = (curvatures(model, TOKENS) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in ("q_proj", "k_proj"))
    assert model.config._attn_implementation == own
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batches_do_not_matter():
    for one, other in zip(*(curvatures(FAMILIES["llama"].build(), TOKENS, batch_size=b) for b in (1, 2)), strict=True):
        for name in ("q_proj", "k_proj"):
            torch.testing.assert_close(one[name], other[name])


def test_of_long_windows_some_queries_are_enough(monkeypatch: pytest.MonkeyPatch):
    model = FAMILIES["llama"].build()
    whole = curvatures(model, MANY)
    monkeypatch.setattr(logits, "_MOST_LOGITS", 4 * LENGTH * LENGTH // 2 - 1)  # every third, of 4 heads
    for one, other in zip(curvatures(model, MANY), whole, strict=True):
        for name in ("q_proj", "k_proj"):
            assert (one[name] - other[name]).norm() < 0.3 * other[name].norm()
            assert not torch.equal(one[name], other[name])


def test_only_as_many_windows_as_are_asked_for():
    model = FAMILIES["llama"].build()
    blocks = find_blocks(model)
    walker = Walker(model, blocks, {"fit": TOKENS}, batch_size=1)
    block = next(iter(walker))
    pair = find_query_key(model, block)
    assert pair is not None
    with torch.no_grad():
        two = walker.logit_curvature(block, pair, "fit", 2 * LENGTH)
    told = curvatures(model, TOKENS[:2], batch_size=1)[0]
    for name, metric in two.items():
        torch.testing.assert_close(metric, told[name.rpartition(".")[2]])


def test_attention_of_its_own_kind_tells_nothing():
    """Code that does not ask transformers for its attention is not seen, and no error."""
    model = FAMILIES["llama"].build()
    block = find_blocks(model)[0]
    pair = find_query_key(model, block)
    assert pair is not None
    del block.module.get_submodule("self_attn").config  # pyright: ignore[reportAttributeAccessIssue]
    curvature = LogitCurvature(model, pair)
    curvature.add(lambda: pytest.fail("nothing to look at"), seed=0)
    assert curvature.value(ALONE) == {}
