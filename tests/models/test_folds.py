"""Folds are found where they are exact and nowhere else, and leave the function as it is, in every family."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from families import (
    ALL_FAMILIES,
    EVERYTHING,
    FAMILIES,
    MORE_FAMILIES,
    Family,
    InFloat64,
    matrix,
    vision_language_model,
    windows,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.errors import InputError
from trimfit.models import find_blocks
from trimfit.models.find_folds import find_folds
from trimfit.models.folds import Folds, HiddenScale, InputScale, ValueOutput
from trimfit.models.wiring import FAMILIES as WIRINGS

Names = tuple[str, ...]
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
UP_DOWN = (("mlp.up_proj", "mlp.down_proj"),)
V_O = (("self_attn.v_proj", "self_attn.o_proj"),)
EXPERTS = range(4)
EXPERT_READERS = ("mlp.gate", *(f"mlp.experts.{i}.gate_up_proj" for i in EXPERTS))
EXPERT_UP_DOWN = tuple((f"mlp.experts.{i}.gate_up_proj", f"mlp.experts.{i}.down_proj") for i in EXPERTS)
ROTARY, NORMED, UNUSED = "positions rotate them", "each is normalised", "only pairs of V and O are supported"
POST = "its output is part of the residual stream"
NOT_HOMOGENEOUS = "with no gate, and is not homogeneous"


@dataclass(frozen=True)
class Case:
    """What must be found in every block of a model, by names within the block, and words of every refusal."""

    family: Family
    inputs: dict[str, Names] = field(
        default_factory=lambda: {"input_layernorm": QKV, "post_attention_layernorm": GATE_UP}
    )
    hidden: tuple[tuple[str, str], ...] = UP_DOWN
    pairs: tuple[tuple[str, str], ...] = V_O
    refused: Names = (ROTARY,)


def _variant(name: str, **options: Any) -> Family:
    family = EVERYTHING[name]
    return replace(family, options=family.options | options)


_GEMMA_INPUTS = {"input_layernorm": QKV, "pre_feedforward_layernorm": GATE_UP}
_OLMO2 = Case(
    ALL_FAMILIES["olmo2"], {}, refused=(NORMED, "they read the residual stream", f"post_attention.*{POST}", POST)
)
_PHI3 = Case(
    FAMILIES["phi3"],
    {"input_layernorm": ("self_attn.qkv_proj",), "post_attention_layernorm": ("mlp.gate_up_proj",)},
    (("mlp.gate_up_proj", "mlp.down_proj"),),
    (("self_attn.qkv_proj", "self_attn.o_proj"),),
)
_GLM = replace(Case(_variant("glm4")), hidden=_PHI3.hidden, inputs=_PHI3.inputs | {"input_layernorm": QKV})
_OPT = Case(
    FAMILIES["opt"],
    {"self_attn_layer_norm": QKV, "final_layer_norm": ("fc1",)},
    (("fc1", "fc2"),),
    (("self_attn.v_proj", "self_attn.out_proj"),),
    (UNUSED,),
)
_OPT_350M = replace(
    _OPT, family=_variant("opt-350m"), inputs={}, refused=(UNUSED, f"self_attn_layer_norm .*{POST}", POST)
)
_GPT_NEOX = Case(
    FAMILIES["gpt_neox"],
    {"input_layernorm": ("attention.query_key_value",), "post_attention_layernorm": ("mlp.dense_h_to_4h",)},
    (),
    (("attention.query_key_value", "attention.dense"),),
    (ROTARY, f"GELUActivation stands between them, {NOT_HOMOGENEOUS}"),
)
_GPT2 = Case(
    FAMILIES["gpt2"],
    {"ln_1": ("attn.c_attn",), "ln_2": ("mlp.c_fc",)},
    (),
    (("attn.c_attn", "attn.c_proj"),),
    (UNUSED, f"mlp.c_fc and mlp.c_proj share no scale: .*{NOT_HOMOGENEOUS}"),
)
_PHI = Case(
    ALL_FAMILIES["phi"],
    {"input_layernorm": (*QKV, "mlp.fc1")},
    (),
    (("self_attn.v_proj", "self_attn.dense"),),
    (ROTARY, NOT_HOMOGENEOUS),
)
_PARALLEL = {"input_layernorm": (*QKV, *GATE_UP)}
_EXPERT_INPUTS = {"input_layernorm": QKV, "post_attention_layernorm": EXPERT_READERS}
_EXPERT_SIZES = {"num_experts_per_tok": 2, "experts_implementation": "eager"}
_LLAMA_OPTIONS = FAMILIES["llama"].options
_MIXTRAL = Family("mixtral", options=_LLAMA_OPTIONS | _EXPERT_SIZES | {"num_local_experts": len(EXPERTS)})
_QWEN3_MOE = Family(
    "qwen3_moe",
    options=FAMILIES["qwen3"].options | _EXPERT_SIZES | {"num_experts": len(EXPERTS), "moe_intermediate_size": 24},
)

CASES: dict[str, Case] = {
    "llama": Case(FAMILIES["llama"]),
    "llama-biases": Case(_variant("llama-biases")),
    "llama-eager": Case(_variant("llama-eager")),
    "llama-tied": Case(_variant("llama-tied")),
    "llama-one-kv-head": Case(_variant("llama", num_key_value_heads=1)),
    "llama-all-kv-heads": Case(_variant("llama", num_key_value_heads=4)),
    "llama-wide-heads": Case(_variant("llama", head_dim=12)),
    "mistral": Case(FAMILIES["mistral"]),
    "qwen2": Case(FAMILIES["qwen2"]),
    "qwen3": Case(FAMILIES["qwen3"], refused=(NORMED,)),
    "gemma": Case(ALL_FAMILIES["gemma"]),
    "gemma2": Case(FAMILIES["gemma2"], _GEMMA_INPUTS, refused=(ROTARY, f"post_attention.*{POST}", POST)),
    "gemma2-eager": Case(EVERYTHING["gemma2-eager"], _GEMMA_INPUTS, refused=(ROTARY, POST, POST)),
    "gemma3_text": Case(FAMILIES["gemma3_text"], _GEMMA_INPUTS, refused=(NORMED, POST, f"post_feedforward.*{POST}")),
    "phi3": _PHI3,
    "phi3-all-kv-heads": replace(_PHI3, family=_variant("phi3", num_key_value_heads=4)),
    "opt": _OPT,
    "opt-350m": _OPT_350M,
    "opt-no-biases": replace(_OPT, family=_variant("opt", enable_bias=False)),
    "opt-gelu": replace(
        _OPT, family=_variant("opt", activation_function="gelu"), hidden=(), refused=(UNUSED, NOT_HOMOGENEOUS)
    ),
    "opt-plain-norms": replace(
        _OPT,
        family=_variant("opt", layer_norm_elementwise_affine=False),
        inputs={},
        refused=(UNUSED, "self_attn_layer_norm takes no scale: it has no weights", "it has no weights"),
    ),
    "gpt_neox": _GPT_NEOX,
    "gpt_neox-sequential": replace(_GPT_NEOX, family=EVERYTHING["gpt_neox-sequential"]),
    "gpt2": _GPT2,
    "gpt2-relu": replace(
        _GPT2,
        family=_variant("gpt2", activation_function="relu"),
        hidden=(("mlp.c_fc", "mlp.c_proj"),),
        refused=(UNUSED,),
    ),
    "mixtral": Case(_MIXTRAL, _EXPERT_INPUTS, EXPERT_UP_DOWN),
    "qwen3_moe": Case(_QWEN3_MOE, _EXPERT_INPUTS, EXPERT_UP_DOWN, refused=(NORMED,)),
    "qwen3_moe-dense": Case(
        replace(_QWEN3_MOE, options=_QWEN3_MOE.options | {"mlp_only_layers": [0, 1]}), refused=(NORMED,)
    ),
    "granite": Case(ALL_FAMILIES["granite"]),
    "smollm3": Case(_variant("smollm3", no_rope_layers=[1, 1])),
    "smollm3-no-positions": Case(_variant("smollm3", no_rope_layers=[0, 0]), refused=(UNUSED,)),
    "stablelm": Case(ALL_FAMILIES["stablelm"]),
    "stablelm-parallel": Case(EVERYTHING["stablelm-parallel"], _PARALLEL, refused=(NORMED,)),
    "olmo": Case(ALL_FAMILIES["olmo"], {}, refused=(ROTARY, "it has no weights", "it has no weights")),
    "olmo-clipped": Case(
        _variant("olmo", clip_qkv=0.5),
        {},
        pairs=(),
        refused=(ROTARY, "no weights", "no weights", "v_proj and self_attn.o_proj are no pair: V is clipped"),
    ),
    "olmo2": _OLMO2,
    "olmo3": replace(_OLMO2, family=ALL_FAMILIES["olmo3"]),
    "glm": replace(_GLM, family=replace(_GLM.family, name="glm")),
    "glm4": replace(_GLM, refused=(ROTARY, f"post_self_attn.*{POST}", f"post_mlp.*{POST}")),
    "starcoder2": Case(
        ALL_FAMILIES["starcoder2"],
        {"input_layernorm": QKV, "post_attention_layernorm": ("mlp.c_fc",)},
        (),
        refused=(ROTARY, NOT_HOMOGENEOUS),
    ),
    "phi": _PHI,
    "phi-norms": replace(_PHI, family=_variant("phi", qk_layernorm=True), refused=(NORMED, NOT_HOMOGENEOUS)),
    "cohere": Case(ALL_FAMILIES["cohere"], _PARALLEL),
    "cohere-norms": Case(_variant("cohere", use_qk_norm=True), _PARALLEL, refused=(NORMED,)),
    "cohere2": Case(_variant("cohere2", layer_types=["sliding_attention"] * 4), _PARALLEL),
    "cohere2-no-positions": Case(_variant("cohere2", layer_types=["full_attention"] * 4), _PARALLEL, refused=(UNUSED,)),
}


def for_each_case() -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(case, id=name) for name, case in CASES.items()])


@torch.no_grad()
def logits(model: PreTrainedModel) -> Tensor:
    with InFloat64():
        return model(input_ids=windows(3), use_cache=False).logits


def block_names(model: PreTrainedModel, family: Family) -> list[str]:
    return [f"{family.stack}.{i}" for i in range(len(model.get_submodule(family.stack)))]


def all_folds(model: PreTrainedModel, family: Family) -> list[Folds]:
    return [find_folds(model, name) for name in block_names(model, family)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def factors(size: int, seed: int) -> Tensor:
    """Log-uniform in 1/4 … 4, float64."""
    generator = torch.Generator().manual_seed(seed)
    return 4.0 ** (2 * torch.rand(size, generator=generator, dtype=torch.float64) - 1)


def matrices(fold: ValueOutput, seed: int) -> Tensor:
    """Another well-conditioned matrix for each KV head: orthogonal between factors of 1/2 … 2."""
    heads, r = fold.value_rows.shape
    noise = torch.randn(heads, r, r, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise)[0] * factors(r, seed).sqrt() @ torch.linalg.qr(noise.mT)[0]


def apply_all(folds: Folds, seed: int = 0) -> None:
    for fold in folds.inputs:
        fold.apply(factors(len(fold.effective_weight()), seed := seed + 1))
    for fold in folds.hidden:
        fold.apply(factors(len(fold.up_rows), seed := seed + 1))
    for fold in folds.pairs:
        fold.apply(matrices(fold, seed := seed + 1))


# What is found.


@for_each_case()
def test_exactly_the_expected_folds(case: Case):
    model = case.family.build()
    for name in block_names(model, case.family):
        folds = find_folds(model, name)

        def within(full: str, name: str = name) -> str:
            assert full.startswith(f"{name}.")
            return full.removeprefix(f"{name}.")

        assert {within(f.norm): tuple(map(within, f.readers)) for f in folds.inputs} == case.inputs
        assert tuple((within(f.up_layer.name), within(f.down_layer.name)) for f in folds.hidden) == case.hidden
        assert tuple((within(f.value_layer.name), within(f.output_layer.name)) for f in folds.pairs) == case.pairs
        assert len(folds.refused) == len(case.refused)
        for sentence, words in zip(folds.refused, case.refused, strict=True):
            assert re.search(words, sentence), sentence
        assert folds.refused[0].startswith("Q and K are no pair: ")


def test_every_known_family_is_tested():
    assert {case.family.name for case in CASES.values()} == set(WIRINGS)


def test_blocks_of_one_model_may_differ():
    experts = replace(_QWEN3_MOE, options=_QWEN3_MOE.options | {"mlp_only_layers": [0]})
    assert [len(folds.hidden) for folds in all_folds(experts.build(), experts)] == [1, len(EXPERTS)]
    family = ALL_FAMILIES["smollm3"]
    for folds, words in zip(all_folds(family.build(), family), (ROTARY, UNUSED), strict=True):
        assert words in folds.refused[0]


@pytest.mark.parametrize("name", sorted(set(MORE_FAMILIES) - set(WIRINGS) - {"gpt_bigcode"}))
def test_unknown_families_have_no_folds(name: str):
    model = ALL_FAMILIES[name].build()
    folds = find_folds(model, find_blocks(model)[0].name)
    assert folds == Folds(refused=(f"no folds in this block: how models of type {name!r} are wired is not known",))


def test_text_part_of_a_vision_language_model():
    model = vision_language_model()
    folds = [find_folds(model, block.name) for block in find_blocks(model)]
    assert [(len(f.inputs), len(f.hidden), len(f.pairs)) for f in folds] == [(2, 1, 1)] * 4


# The function stays as it is.


@for_each_case()
def test_folds_change_weights_and_not_the_function(case: Case):
    model = case.family.build().double()
    before, plain = logits(model), weights(model)
    for i, folds in enumerate(all_folds(model, case.family)):
        apply_all(folds, 100 * i)
    after, folded = logits(model), weights(model)
    assert (after - before).abs().max() < 1e-10 * before.abs().max()
    for name in block_names(model, case.family):
        for norm, readers in case.inputs.items():
            for place in (norm, *readers):
                assert _changed(plain, folded, f"{name}.{place}")
        for place in (place for pair in (*case.hidden, *case.pairs) for place in pair):
            assert _changed(plain, folded, f"{name}.{place}")


def _changed(plain: dict[str, Tensor], folded: dict[str, Tensor], place: str) -> bool:
    """The weight of the module, or of the expert, has moved."""
    if ".experts." in place:
        holder, _, rest = place.rpartition(".experts.")
        expert, _, parameter = rest.partition(".")
        name = f"{holder}.experts.{parameter}"
        return not torch.equal(plain[name][int(expert)], folded[name][int(expert)])
    return not torch.equal(plain[f"{place}.weight"], folded[f"{place}.weight"])


@pytest.mark.parametrize(
    "name", ["llama-biases", "gemma2", "phi3", "opt", "gpt_neox", "gpt2-relu", "mixtral", "cohere"]
)
def test_half_a_fold_does_change_the_function(name: str):
    """The other way round: the tests above would see a fold that forgets one side."""
    family = CASES[name].family
    plain = family.build().double()
    before = logits(plain)

    def error(change: Callable[[Folds], object]) -> float:
        model = copy.deepcopy(plain)
        change(find_folds(model, block_names(model, family)[0]))
        return ((logits(model) - before).abs().max() / before.abs().max()).item()

    def scale_norm(folds: Folds, i: int) -> None:
        fold = folds.inputs[i]
        fold.scale_norm(factors(len(fold.effective_weight()), 1))

    def turn_values(folds: Folds) -> None:
        (fold,) = folds.pairs
        a, b, bias = fold.pairs(torch.float64)
        fold.write(a, matrices(fold, 1) @ b, bias)

    def turn_hidden(folds: Folds) -> None:
        layer = folds.hidden[0].down_layer
        layer.write(layer.weight / factors(layer.weight.shape[1], 1))

    for i in range(len(CASES[name].inputs)):
        assert error(lambda folds, i=i: scale_norm(folds, i)) > 1e-4
    assert error(turn_values) > 1e-4
    if CASES[name].hidden:
        assert error(turn_hidden) > 1e-4
    if name in ("llama-biases", "opt", "gpt2-relu"):
        assert error(lambda f: f.hidden[0].scale_bias(factors(len(f.hidden[0].up_rows), 1))) > 1e-4
        assert error(lambda f: f.pairs[0].write_bias(2 * f.pairs[0].bias())) > 1e-4


def test_folds_are_found_again_and_add_up():
    case = CASES["gemma3_text"]
    model = case.family.build().double()
    before = logits(model)
    for i in range(3):
        for folds in all_folds(model, case.family):
            apply_all(folds, i)
    assert (logits(model) - before).abs().max() < 1e-10 * before.abs().max()


# Models in the dtypes in which they come.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3_text", "opt", "cohere", "mixtral"])
def test_storable_factors_are_exact_in_the_norm(name: str, dtype: torch.dtype):
    family = CASES[name].family
    model = family.build().to(dtype)
    for fold in find_folds(model, block_names(model, family)[1]).inputs:
        gamma = fold.effective_weight()
        assert gamma.dtype == torch.float64
        t = factors(len(gamma), 1)
        near = fold.storable(t)
        assert near.dtype == torch.float64
        # One rounding of what is stored, and in Gemma another one where the norm adds 1 to it.
        stored, effective = (gamma * t - fold.offset).abs(), (gamma * t).abs()
        rounding = torch.finfo(dtype).eps * stored + fold.offset * torch.finfo(torch.float32).eps * effective
        assert ((near - t) * gamma).abs().le(0.51 * rounding).all()
        torch.testing.assert_close(fold.storable(near), near, rtol=1e-15, atol=0)
        fold.scale_norm(near)
        torch.testing.assert_close(fold.effective_weight(), gamma * near, rtol=1e-15, atol=0)
        # What the norm itself does with it: with an input of ones, RMS norms give the weight, up to their epsilon.
        if name != "opt" and name != "cohere":
            ones = torch.ones(1, len(gamma), dtype=torch.float32)
            torch.testing.assert_close(fold.module.float()(ones)[0].double(), gamma * near, rtol=1e-5, atol=1e-6)


def test_storable_factors_of_weights_at_the_edges():
    model = FAMILIES["llama"].build().half()
    fold = find_folds(model, "model.layers.0").inputs[0]
    with torch.no_grad():
        fold.module.get_parameter("weight")[:4] = torch.tensor([0.0, 1e-7, 6e4, -0.5])
    t = torch.full((32,), 2.0)
    t[1] = 0.1  # too small for float16 now, as the third is too large
    near = fold.storable(t)
    assert near[:4].tolist() == [1.0, 1.0, 1.0, 2.0]
    fold.apply(near)
    assert fold.module.get_parameter("weight")[:4].tolist() == torch.tensor([0.0, 1e-7, 6e4, -1.0]).half().tolist()

    model = FAMILIES["gemma2"].build().bfloat16()
    fold = find_folds(model, "model.layers.0").inputs[0]
    with torch.no_grad():
        fold.module.get_parameter("weight")[:3] = torch.tensor([-1.0, 2.0**-30, 3.0])
    near = fold.storable(torch.full((32,), 1.5))
    assert near[:3].tolist() == [1.0, 1.5, 1.5]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama-biases", "qwen2", "phi3", "opt", "gpt2-relu", "gpt_neox"])
@torch.no_grad()
def test_powers_of_two_leave_every_bit_of_a_half_precision_model(name: str, dtype: torch.dtype):
    family = CASES[name].family
    model = family.build().to(dtype)
    before = model(input_ids=windows(2), use_cache=False).logits
    for folds in all_folds(model, family):
        for fold in folds.inputs:
            t = 2.0 ** factors(len(fold.effective_weight()), 1).log2().round()
            torch.testing.assert_close(fold.storable(t), t, rtol=0, atol=0)
            fold.apply(t)
        for fold in folds.hidden:
            fold.apply(2.0 ** factors(len(fold.up_rows), 2).log2().round())
    assert torch.equal(model(input_ids=windows(2), use_cache=False).logits, before)


# What callers work with: copies, rows and columns.


@pytest.mark.parametrize("name", CASES)
def test_pairs_are_written_back_as_they_were(name: str):
    family = CASES[name].family
    model = family.build().bfloat16()
    before = weights(model)
    for folds in all_folds(model, family):
        for fold in folds.pairs:
            fold.write(*fold.pairs())
    after = weights(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", ["llama-biases", "llama-wide-heads", "phi3", "gpt_neox", "gpt2"])
def test_pairs_by_head(name: str):
    """A and B against slices that are written down here for each layout: W of q, k, v first, then one head of each."""
    family = CASES[name].family
    model = family.build().double()
    (fold,) = find_folds(model, block_names(model, family)[0]).pairs
    kv_heads, group, r = fold.output_columns.shape
    heads = kv_heads * group
    assert (kv_heads, group, r) == {
        "llama-biases": (2, 2, 8),
        "llama-wide-heads": (2, 2, 12),
        "phi3": (2, 2, 8),
        "gpt_neox": (4, 1, 8),
        "gpt2": (4, 1, 8),
    }[name]
    value, output = matrix(fold.value_layer.module), matrix(fold.output_layer.module)
    if name == "gpt_neox":
        values = [value[h * 3 * r + 2 * r : (h + 1) * 3 * r] for h in range(heads)]
    else:
        values = list(value[-kv_heads * r :].split(r))
    a, b, bias = fold.pairs(torch.float64)
    assert a.shape == (kv_heads, group * len(output), r)
    assert b.shape == (kv_heads, r, value.shape[1])
    assert (bias is None) == (name in ("llama-wide-heads", "phi3"))
    for h in range(heads):
        kv, j = divmod(h, group)
        assert torch.equal(b[kv], values[kv])
        part = a[kv, j * len(output) : (j + 1) * len(output)]
        assert torch.equal(part, output[:, h * r : (h + 1) * r])
    assert fold.pairs()[0].dtype == fold.pairs()[1].dtype == torch.float32

    # As from working copies.
    from_copies = fold.gather(value, output)
    assert torch.equal(from_copies[0], a) and torch.equal(from_copies[1], b)
    new_value, new_output = value.clone(), output.clone()
    fold.scatter(2 * a, 3 * b, new_value, new_output)
    assert torch.equal(new_output, 2 * output)
    others = torch.ones(len(value), dtype=torch.bool)
    others[fold.value_rows] = False
    assert torch.equal(new_value[others], value[others])
    assert torch.equal(new_value[~others], 3 * value[~others])
    assert torch.equal(matrix(fold.value_layer.module), value)


@pytest.mark.parametrize("name", CASES)
def test_products_of_pairs_stay(name: str):
    family = CASES[name].family
    model = family.build().double()
    for fold in find_folds(model, block_names(model, family)[0]).pairs:
        a, b, bias = fold.pairs(torch.float64)
        m = matrices(fold, 1)
        fold.apply(m)
        new_a, new_b, new_bias = fold.pairs(torch.float64)
        torch.testing.assert_close(new_a @ new_b, a @ b)
        torch.testing.assert_close(new_b, m @ b)
        assert (bias is None) == (new_bias is None)
        if bias is not None and new_bias is not None:
            torch.testing.assert_close(new_bias, torch.einsum("hij,hj->hi", m, bias))


@pytest.mark.parametrize("name", ["llama", "phi3", "opt", "gpt2-relu", "mixtral"])
def test_copies_of_weights(name: str):
    """Copies are in the dtype asked for, the right rows and columns, and not the model's own memory."""
    family = CASES[name].family
    model = family.build()
    before = weights(model)
    folds = find_folds(model, block_names(model, family)[0])
    for fold in folds.inputs:
        for layer, weight in zip(fold.layers, fold.reader_weights(), strict=True):
            assert torch.equal(weight, layer.weight)
            assert layer.weight.shape[1] == len(fold.effective_weight())
            weight.zero_()
        assert {weight.dtype for weight in fold.reader_weights(torch.float64)} == {torch.float64}
    for fold in folds.hidden:
        width = fold.down_layer.weight.shape[1]
        assert torch.equal(fold.up_weight(), fold.up_layer.weight[-width:])
        assert torch.equal(fold.down_weight(), fold.down_layer.weight)
        assert fold.up_rows.shape == (width,)
        assert fold.up_weight(torch.float64).dtype == fold.down_weight(torch.float64).dtype == torch.float64
        fold.up_weight().zero_()
        fold.down_weight().zero_()
    for fold in folds.pairs:
        for part in fold.pairs():
            if part is not None:
                part.zero_()
    after = weights(model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_experts_are_layers():
    model = _MIXTRAL.build()
    fold = find_folds(model, "model.layers.1").hidden[3]
    experts = model.get_submodule("model.layers.1.mlp.experts")
    assert fold.up_layer.name == "model.layers.1.mlp.experts.3.gate_up_proj"
    assert torch.equal(fold.up_layer.weight, experts.get_parameter("gate_up_proj")[3])
    before = weights(model)
    fold.down_layer.write(torch.ones(32, 48))
    after = weights(model)
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {"model.layers.1.mlp.experts.down_proj"}
    assert torch.equal(after[changed.pop()][3], torch.ones(32, 48))


# What is refused.


def llama_folds(change: Callable[[Any], object], **options: Any) -> Folds:
    model = FAMILIES["llama"].build(**options)
    change(model)
    return find_folds(model, "model.layers.0")


def _refused_whole(folds: Folds, words: str) -> None:
    (sentence,) = folds.refused
    assert words in sentence
    assert folds == Folds(refused=(sentence,))


class _OwnLinear(nn.Linear):
    """Some other library's layer."""


def test_a_layer_of_another_class_is_refused():
    def change(model: Any) -> None:
        model.model.layers[0].self_attn.v_proj = _OwnLinear(32, 16, bias=False)

    _refused_whole(llama_folds(change), "self_attn.v_proj is a _OwnLinear, which no block of llama should be")


def test_a_block_of_another_class_is_refused():
    """Code from elsewhere that calls itself llama."""

    def change(model: Any) -> None:
        block = model.model.layers[0]
        block.__class__ = type("LlamaDecoderLayer", (type(block),), {"__module__": "modeling_custom"})

    _refused_whole(llama_folds(change), "it is a LlamaDecoderLayer, which no block of llama should be")


@pytest.mark.parametrize("place", ["self_attn.gate_proj", "self_attn.v_norm", "adapter"])
def test_parameters_that_nobody_expects_are_refused(place: str):
    def change(model: Any) -> None:
        extra = nn.LayerNorm(8) if "norm" in place else nn.Linear(32, 32)
        holder, _, name = place.rpartition(".")
        model.model.layers[0].get_submodule(holder).add_module(name, extra)

    _refused_whole(llama_folds(change), f"what {place}.weight is for is not known")


def test_a_parameter_beside_the_layers_is_refused():
    def change(model: Any) -> None:
        model.model.layers[0].self_attn.sinks = nn.Parameter(torch.zeros(4))

    _refused_whole(llama_folds(change), "what self_attn.sinks is for is not known")


@pytest.mark.parametrize("place", ["input_layernorm", "self_attn.v_proj", "mlp.up_proj"])
def test_shared_weights_are_refused(place: str):
    def change(model: Any) -> None:
        first, second = (model.model.layers[i].get_submodule(place) for i in (0, 1))
        first.weight = second.weight

    words = f"{place}.weight shares its weights with model.layers.1.{place}.weight"
    _refused_whole(llama_folds(change), words)


def test_quantized_weights_are_refused():
    def change(model: Any) -> None:
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    _refused_whole(llama_folds(change), "mlp.up_proj.weight is quantized (torch.float8_e4m3fn)")


def test_weights_that_are_elsewhere_are_refused():
    _refused_whole(llama_folds(lambda model: model.to("meta")), "is not in memory")


def test_a_missing_layer_is_refused():
    def change(model: Any) -> None:
        block = model.model.layers[0]
        del block.self_attn.v_proj
        del block.mlp.up_proj

    folds = llama_folds(change)
    assert folds.inputs == folds.hidden == folds.pairs == ()
    assert folds.refused[1:] == (
        "input_layernorm takes no scale: there is no self_attn.v_proj",
        "post_attention_layernorm takes no scale: there is no mlp.up_proj",
        "mlp.up_proj and mlp.down_proj share no scale: there is no mlp.up_proj",
        "self_attn.v_proj and self_attn.o_proj are no pair: there is no self_attn.v_proj",
    )


def test_widths_that_do_not_fit_are_refused():
    def change(model: Any) -> None:
        block = model.model.layers[0]
        block.self_attn.q_proj = nn.Linear(24, 32, bias=False)
        block.self_attn.v_proj = nn.Linear(32, 12, bias=False)
        block.mlp.up_proj = nn.Linear(32, 47, bias=False)

    folds = llama_folds(change)
    assert [fold.norm for fold in folds.inputs] == ["model.layers.0.post_attention_layernorm"]
    assert folds.hidden == folds.pairs == ()
    assert folds.refused[1:] == (
        "input_layernorm takes no scale: its weights (32,) do not fit self_attn.q_proj",
        "mlp.up_proj and mlp.down_proj share no scale: the 47 rows of the one do not fit the 48 columns of the other",
        "self_attn.v_proj and self_attn.o_proj are no pair: 12 rows of the former are not 2 heads of size 8",
    )


def test_heads_that_do_not_fit_are_refused():
    def change(model: Any) -> None:
        model.model.layers[0].self_attn.head_dim = 16

    (sentence,) = llama_folds(change).refused[1:]
    assert "32 columns of the latter are not 4 heads of size 16" in sentence


def test_interleaved_experts_are_refused():
    model = _MIXTRAL.build()
    model.get_submodule("model.layers.0.mlp.experts").is_concatenated = False
    folds = find_folds(model, "model.layers.0")
    assert folds.hidden == ()
    assert len(folds.inputs) == 2
    assert folds.refused[1].endswith("share no scale: rows of gate and up alternate")


def test_a_block_without_the_facts_of_its_family_is_refused():
    model = FAMILIES["opt"].build()
    del model.get_submodule("model.decoder.layers.0").do_layer_norm_before
    folds = find_folds(model, "model.decoder.layers.0")
    _refused_whole(folds, "it is not wired as blocks of opt are")


# What cannot be applied.


def _folds() -> tuple[InputScale, HiddenScale, ValueOutput, PreTrainedModel]:
    model = CASES["llama-biases"].family.build()
    folds = find_folds(model, "model.layers.0")
    return folds.inputs[0], folds.hidden[0], folds.pairs[0], model


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
def test_factors_must_be_positive_and_finite(bad: float):
    scale, hidden, _, model = _folds()
    before = weights(model)
    t, c = torch.ones(32), torch.ones(48)
    t[3] = c[3] = bad
    for use in (scale.apply, scale.scale_norm, scale.storable):
        with pytest.raises(InputError, match="input_layernorm are not all positive and finite"):
            use(t)
    for use in (hidden.apply, hidden.scale_bias):
        with pytest.raises(InputError, match=r"mlp\.up_proj are not all positive and finite"):
            use(c)
    assert all(torch.equal(weights(model)[key], value) for key, value in before.items())


def test_factors_must_be_as_many_as_channels():
    scale, hidden, pair, _ = _folds()
    with pytest.raises(InputError, match=r"takes 32 factors, but these are of shape \(31,\)"):
        scale.apply(torch.ones(31))
    with pytest.raises(InputError, match=r"takes 48 factors, but these are of shape \(1,\)"):
        hidden.apply(torch.ones(1))
    with pytest.raises(InputError, match=r"v_proj takes matrices \(2, 8, 8\), but these are \(8, 8\)"):
        pair.apply(torch.eye(8))


@pytest.mark.parametrize("bad", ["singular", "not finite"])
def test_matrices_must_be_invertible_and_finite(bad: str):
    *_, pair, model = _folds()
    before = weights(model)
    m = torch.eye(8).repeat(2, 1, 1)
    m[1, 2, 2] = 0.0 if bad == "singular" else float("nan")
    with pytest.raises(InputError, match="v_proj are not finite, or cannot be inverted"):
        pair.apply(m)
    assert all(torch.equal(weights(model)[key], value) for key, value in before.items())


def test_biases_are_not_forgotten():
    *_, pair, _ = _folds()
    a, b, bias = pair.pairs()
    with pytest.raises(InputError, match=r"v_proj has a bias, unlike what is written"):
        pair.write(a, b, None)
    plain = FAMILIES["llama"].build()
    (pair,) = find_folds(plain, "model.layers.0").pairs
    with pytest.raises(InputError, match=r"v_proj has no bias, unlike what is written"):
        pair.write(a, b, bias)
