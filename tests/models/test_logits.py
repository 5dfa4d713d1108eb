"""The curvature of attention logits, against the divergence that small errors in the outputs of Q and K make."""

from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, EXPERT_FAMILIES, FAMILIES, LENGTH, OWN_ATTENTION, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.models import Walker, find_blocks, find_query_key, logits
from trimfit.models.hooks import after
from trimfit.models.logits import LogitCurvature
from trimfit.ranks import ALONE, Ranks

TOKENS = windows(4)
MANY = TOKENS.repeat(64, 1)  # draws for the same tokens

# Rotated, with norms of Q and K, with a cap on the logits and local attention, not rotated, with sinks.
NAMES = ["llama", "qwen3", "gemma2", "opt", "olmo2", "gpt_oss"]


def curvatures(
    model: PreTrainedModel, tokens: Tensor, asked: int | None = None, **more: Any
) -> list[dict[str, Tensor]]:
    """Of each block, by the last part of a layer's name; of all tokens, if not so many are `asked` for."""
    walker = Walker(model, find_blocks(model), {"fit": tokens}, **more)
    found: list[dict[str, Tensor]] = []
    for block in walker:
        pair = find_query_key(model, block)
        assert pair is not None
        told = walker.logit_curvature(block, pair, "fit", tokens.numel() if asked is None else asked)
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


@pytest.mark.parametrize("asked", [LENGTH, 3 * LENGTH - 5, 4 * LENGTH])
def test_batches_do_not_matter(asked: int):
    told = [curvatures(FAMILIES["llama"].build(), TOKENS, asked, batch_size=b) for b in (1, 2, 8)]
    few = curvatures(FAMILIES["llama"].build(), TOKENS[: -(-asked // LENGTH)], batch_size=1)  # no others are seen
    for other in told:
        for one, two in zip(few, other, strict=True):
            for name in ("q_proj", "k_proj"):
                torch.testing.assert_close(one[name], two[name])


class First(Ranks):
    """The first of two processes, whose sums are kept for the second."""

    def __init__(self):
        super().__init__(0, 2)
        self.told: list[Tensor] = []

    def sum(self, tensor: Tensor) -> None:
        self.told.append(tensor.clone())


class Second(Ranks):
    """The second of two processes; what the first has told is added to what it has."""

    def __init__(self, told: list[Tensor]):
        super().__init__(1, 2)
        self._told = iter(told)

    def sum(self, tensor: Tensor) -> None:
        tensor += next(self._told)


@pytest.mark.parametrize("asked", [LENGTH, 3 * LENGTH])
def test_processes_see_together_what_one_sees_alone(asked: int):
    """Also where there are so few windows that the second has none."""
    alone = curvatures(FAMILIES["llama"].build(), TOKENS, asked, batch_size=1)
    first = First()
    curvatures(FAMILIES["llama"].build(), TOKENS, asked, batch_size=1, ranks=first)
    both = curvatures(FAMILIES["llama"].build(), TOKENS, asked, batch_size=1, ranks=Second(first.told))
    for one, two in zip(alone, both, strict=True):
        for name in ("q_proj", "k_proj"):
            torch.testing.assert_close(one[name], two[name])


# Without a mask, with those of local attention, bool and float, with sinks.
@pytest.mark.parametrize(
    ("name", "kind"), [("llama", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager"), ("gpt_oss", "eager")]
)
def test_of_long_windows_some_queries_are_enough(name: str, kind: str, monkeypatch: pytest.MonkeyPatch):
    model = (ALL_FAMILIES | EXPERT_FAMILIES)[name].build()
    model.set_attn_implementation(kind)
    whole = curvatures(model, MANY)
    monkeypatch.setattr(logits, "MOST_LOGITS", 4 * LENGTH * LENGTH // 2 - 1)  # every third, of 4 heads
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


@pytest.mark.parametrize("name", ["gptj", "gpt_neo"])
def test_families_with_attention_of_their_own_tell_nothing(name: str):
    assert curvatures(ALL_FAMILIES[name].build(), TOKENS) == [{}, {}]


def test_q_and_k_are_those_of_the_module_that_attends():
    """In MiniMax-M3 an indexer within attention has a Q and a K too; where it chooses keys, attention is its own."""
    model = OWN_ATTENTION["minimax_m3_vl_text"].build()
    pairs = [find_query_key(model, block) for block in find_blocks(model)]
    assert [pair and pair.query.name for pair in pairs] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
    dense, sparse = curvatures(model, TOKENS)
    assert dense.keys() == {"q_proj", "k_proj"} and sparse == {}


@pytest.mark.parametrize("name", ["afmoe", "olmo"])
def test_masks_by_keyword_and_outputs_changed_in_place(name: str):
    """AFMoE hands over its mask by keyword; OLMo clamps what Q and K give where it lies."""
    for told in curvatures(OWN_ATTENTION[name].build(), TOKENS):
        assert told.keys() == {"q_proj", "k_proj"} and all(metric.any() for metric in told.values())


def test_what_the_logits_do_not_depend_on_tells_nothing():
    """A layer that is named as K is, but whose outputs go elsewhere."""
    model = FAMILIES["llama"].build()
    pair = find_query_key(model, find_blocks(model)[0])
    assert pair is not None
    curvature = LogitCurvature(model, pair)

    def lose(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        return output.detach()

    def run() -> None:
        with after([(pair.key.module, lose)]):  # its hook comes behind the one that sees the output
            model(TOKENS, use_cache=False)

    curvature.add(run, seed=0)
    assert curvature.value(ALONE) == {}


def told_otherwise(monkeypatch: pytest.MonkeyPatch, **changed: Any) -> None:
    """Attention is handed something else than the model hands over: None for the mask, or keywords."""
    own: Any = vars(logits)["_logits"]

    def other(module: nn.Module, query: Tensor, key: Tensor, mask: Any, every: int, **how: Any) -> Tensor | None:
        mask = changed.get("attention_mask", mask)
        return own(module, query, key, mask, every, **{**how, **changed, "attention_mask": None})

    monkeypatch.setattr(logits, "_logits", other)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_local_attention_without_a_mask(name: str, monkeypatch: pytest.MonkeyPatch):
    """As flash attention has it: the width of its window is all that is told."""
    model = FAMILIES[name].build()
    expected = curvatures(model, TOKENS)
    told_otherwise(monkeypatch, attention_mask=None)
    for one, other in zip(curvatures(model, TOKENS), expected, strict=True):
        for name in ("q_proj", "k_proj"):
            torch.testing.assert_close(one[name], other[name])


@pytest.mark.parametrize(
    "changed",
    [
        {"position_bias": torch.zeros(1)},
        {"block_indices": torch.zeros(1)},
        {"attention_mask": torch.ones(4, LENGTH)},
        {"attention_mask": None, "is_causal": False},
    ],
    ids=str,
)
def test_what_is_not_known_tells_nothing(changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    model = FAMILIES["mistral"].build()
    told_otherwise(monkeypatch, **changed)
    assert curvatures(model, TOKENS) == [{}, {}]


def test_several_at_one_time():
    """One model's curvature is taken while another's is: threads do so."""
    models = [FAMILIES["llama"].build(seed) for seed in (0, 1)]
    pairs = [find_query_key(model, find_blocks(model)[0]) for model in models]
    both = [LogitCurvature(model, pair) for model, pair in zip(models, pairs, strict=True) if pair is not None]

    def run() -> None:
        both[1].add(lambda: models[1](TOKENS, use_cache=False), seed=0)
        models[0](TOKENS, use_cache=False)

    both[0].add(run, seed=0)
    assert all(one.value(ALONE) for one in both)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_tells_about_the_same(dtype: torch.dtype):
    exact, half = FAMILIES["llama"].build(), FAMILIES["llama"].build(dtype=dtype)
    assert half.dtype == dtype
    for one, other in zip(curvatures(half, MANY), curvatures(exact, MANY), strict=True):
        for name in ("q_proj", "k_proj"):
            assert one[name].dtype == torch.float64
            assert (one[name] - other[name]).norm() < 0.1 * other[name].norm()
