"""How the decoder blocks of known families are wired: what no module tree tells, written down from their code.

A new family is one entry in `FAMILIES`, after its modeling code in transformers was read. All names are within a block.
What an entry claims about modules and widths is verified where it is used.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn


@dataclass(frozen=True)
class Norm:
    """A norm and all that reads its output: these layers, and nothing else."""

    name: str
    readers: tuple[str, ...]


@dataclass(frozen=True)
class Attention:
    """The layer that makes V and the layer that reads what the heads give.

    - `layout`: rows of `value`: V "alone"; Q, K and V "stacked"; or Q, K and V of one head after the other, "by head".
    - `obstacle`: what stands between the two beside the average over tokens, if anything does.
    """

    value: str
    output: str
    layout: Literal["alone", "stacked", "by head"] = "alone"
    obstacle: str | None = None


@dataclass(frozen=True)
class Mlp:
    """The layer that makes the hidden units and the layer that reads them.

    - `gate`: the activated gate that multiplies them comes from a layer "apart", or from the first half of the rows
      of `up`, "stacked".
    - `gate_layer`: the layer apart.
    - `activation`: where the function is that is applied to the gate, or to the units themselves without one.
    """

    up: str
    down: str
    gate: Literal["apart", "stacked"] | None = None
    gate_layer: str = ""
    activation: str = "mlp.act_fn"


@dataclass(frozen=True)
class Wiring:
    """One decoder block.

    - `norms`: those that can take a scale.
    - `others`: modules that hold parameters, are part of no fold, and spoil none. They may be absent.
    - `refused`: why there are no folds elsewhere, one sentence each.
    - `offset`: what the norms add to their weights.
    - `after`: the norms of `others` that the outputs of attention and MLP pass on their way to the residual stream.
    """

    norms: tuple[Norm, ...]
    attention: Attention
    mlp: Mlp
    others: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    offset: float = 0.0
    after: tuple[str, str] | None = None


_ROTARY = "Q and K are no pair: positions rotate them before their product"
_NORMED = "Q and K are no pair: each is normalised before their product"
_UNUSED = "Q and K are no pair: nothing stands between them here, but only pairs of V and O are supported"


def _post_norm(name: str) -> str:
    return f"{name} takes no scale: its output is part of the residual stream"


_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATE_UP = ("mlp.gate_proj", "mlp.up_proj")
_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_QK_LAYERNORMS = ("self_attn.q_layernorm", "self_attn.k_layernorm")

_LLAMA = Wiring(
    norms=(Norm("input_layernorm", _QKV), Norm("post_attention_layernorm", _GATE_UP)),
    attention=Attention("self_attn.v_proj", "self_attn.o_proj"),
    mlp=Mlp("mlp.up_proj", "mlp.down_proj", gate="apart", gate_layer="mlp.gate_proj"),
    refused=(_ROTARY,),
)
_QWEN3 = replace(_LLAMA, others=_QK_NORMS, refused=(_NORMED,))
_GEMMA = replace(_LLAMA, offset=1.0)
_GEMMA2_POST_NORMS = ("post_attention_layernorm", "post_feedforward_layernorm")
_GEMMA2 = replace(
    _GEMMA,
    norms=(Norm("input_layernorm", _QKV), Norm("pre_feedforward_layernorm", _GATE_UP)),
    others=_GEMMA2_POST_NORMS,
    after=_GEMMA2_POST_NORMS,
    refused=(_ROTARY, *map(_post_norm, _GEMMA2_POST_NORMS)),
)
_GEMMA3 = replace(
    _GEMMA2,
    others=(*_GEMMA2_POST_NORMS, *_QK_NORMS),
    refused=(_NORMED, *map(_post_norm, _GEMMA2_POST_NORMS)),
)
_OLMO2 = replace(
    _LLAMA,
    norms=(),
    others=(*_QKV, *_GATE_UP, *_QK_NORMS, *_GEMMA2_POST_NORMS),
    after=_GEMMA2_POST_NORMS,
    refused=(
        _NORMED,
        "self_attn and mlp take no scale: they read the residual stream, with no norm before them",
        *map(_post_norm, _GEMMA2_POST_NORMS),
    ),
)
_PHI3 = Wiring(
    norms=(
        Norm("input_layernorm", ("self_attn.qkv_proj",)),
        Norm("post_attention_layernorm", ("mlp.gate_up_proj",)),
    ),
    attention=Attention("self_attn.qkv_proj", "self_attn.o_proj", "stacked"),
    mlp=Mlp("mlp.gate_up_proj", "mlp.down_proj", gate="stacked", activation="mlp.activation_fn"),
    refused=(_ROTARY,),
)
_GLM = replace(
    _LLAMA,
    norms=(Norm("input_layernorm", _QKV), Norm("post_attention_layernorm", ("mlp.gate_up_proj",))),
    mlp=_PHI3.mlp,
)
_GLM4_POST_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")
_GLM4 = replace(
    _GLM, others=_GLM4_POST_NORMS, after=_GLM4_POST_NORMS, refused=(_ROTARY, *map(_post_norm, _GLM4_POST_NORMS))
)
_STARCODER2 = replace(
    _LLAMA,
    norms=(Norm("input_layernorm", _QKV), Norm("post_attention_layernorm", ("mlp.c_fc",))),
    mlp=Mlp("mlp.c_fc", "mlp.c_proj", activation="mlp.act"),
)
_PHI = Wiring(
    norms=(Norm("input_layernorm", (*_QKV, "mlp.fc1")),),
    attention=Attention("self_attn.v_proj", "self_attn.dense"),
    mlp=Mlp("mlp.fc1", "mlp.fc2", activation="mlp.activation_fn"),
    refused=(_ROTARY,),
)
_COHERE = replace(_LLAMA, norms=(Norm("input_layernorm", (*_QKV, *_GATE_UP)),))
_GPT_NEOX = Wiring(  # in parallel or not, each norm has one reader
    norms=(
        Norm("input_layernorm", ("attention.query_key_value",)),
        Norm("post_attention_layernorm", ("mlp.dense_h_to_4h",)),
    ),
    attention=Attention("attention.query_key_value", "attention.dense", "by head"),
    mlp=Mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", activation="mlp.act"),
    refused=(_ROTARY,),
)
_GPT2 = Wiring(
    norms=(Norm("ln_1", ("attn.c_attn",)), Norm("ln_2", ("mlp.c_fc",))),
    attention=Attention("attn.c_attn", "attn.c_proj", "stacked"),
    mlp=Mlp("mlp.c_fc", "mlp.c_proj", activation="mlp.act"),
    refused=(_UNUSED,),
)
_OPT = Wiring(
    norms=(Norm("self_attn_layer_norm", _QKV), Norm("final_layer_norm", ("fc1",))),
    attention=Attention("self_attn.v_proj", "self_attn.out_proj"),
    mlp=Mlp("fc1", "fc2", activation="activation_fn"),
    refused=(_UNUSED,),
)
_OPT_POST_NORMS = ("self_attn_layer_norm", "final_layer_norm")
_OPT_350M = replace(
    _OPT,
    norms=(),
    others=(*_QKV, *_OPT_POST_NORMS),
    after=_OPT_POST_NORMS,
    refused=(_UNUSED, *map(_post_norm, _OPT_POST_NORMS)),
)
_MIXTRAL = replace(
    _LLAMA,
    norms=(
        Norm("input_layernorm", _QKV),
        Norm("post_attention_layernorm", ("mlp.gate", "mlp.experts.gate_up_proj")),  # the router is mlp.gate
    ),
    mlp=Mlp("mlp.experts.gate_up_proj", "mlp.experts.down_proj", gate="stacked", activation="mlp.experts.act_fn"),
)
_QWEN3_EXPERTS = replace(_MIXTRAL, others=_QK_NORMS, refused=(_NORMED,))


def _cohere(block: nn.Module) -> Wiring:
    return _with_qk_norms(_COHERE, block, "self_attn.use_qk_norm", _QK_NORMS)


def _cohere2(block: nn.Module) -> Wiring:
    return _COHERE if _fact(block, "self_attn.sliding_window") else replace(_COHERE, refused=(_UNUSED,))


def _olmo(block: nn.Module) -> Wiring:
    norms = ("input_layernorm", "post_attention_layernorm")
    plain = replace(
        _LLAMA,
        norms=(),
        others=(*_QKV, *_GATE_UP),
        refused=(_ROTARY, *(f"{norm} takes no scale: it has no weights" for norm in norms)),
    )
    clipped = _fact(block, "self_attn.config.clip_qkv") is not None
    return replace(plain, attention=replace(_LLAMA.attention, obstacle="V is clipped")) if clipped else plain


def _opt(block: nn.Module) -> Wiring:
    return _OPT if _fact(block, "do_layer_norm_before") else _OPT_350M


def _phi(block: nn.Module) -> Wiring:
    return _with_qk_norms(_PHI, block, "self_attn.qk_layernorm", _QK_LAYERNORMS)


def _qwen3_moe(block: nn.Module) -> Wiring:
    return _QWEN3_EXPERTS if hasattr(block.get_submodule("mlp"), "experts") else _QWEN3  # some blocks are dense


def _smollm3(block: nn.Module) -> Wiring:
    return _LLAMA if _fact(block, "self_attn.use_rope") else replace(_LLAMA, refused=(_UNUSED,))


def _stablelm(block: nn.Module) -> Wiring:
    wiring = _COHERE if _fact(block, "use_parallel_residual") else _LLAMA
    return _with_qk_norms(wiring, block, "self_attn.qk_layernorm", _QK_LAYERNORMS)


def _with_qk_norms(wiring: Wiring, block: nn.Module, switch: str, norms: tuple[str, ...]) -> Wiring:
    return replace(wiring, others=norms, refused=(_NORMED,)) if _fact(block, switch) else wiring


def _fact(block: nn.Module, path: str) -> object:
    """An attribute that the block's own code branches on; raises `AttributeError` where there is none."""
    value: object = block
    for name in path.split("."):
        value = getattr(value, name)
    return value


# By `model_type`: the wiring of every block, or how to tell it from a block.
FAMILIES: dict[str, Wiring | Callable[[nn.Module], Wiring]] = {
    "cohere": _cohere,
    "cohere2": _cohere2,
    "gemma": _GEMMA,
    "gemma2": _GEMMA2,
    "gemma3_text": _GEMMA3,
    "glm": _GLM,
    "glm4": _GLM4,
    "gpt2": _GPT2,
    "gpt_neox": _GPT_NEOX,
    "granite": _LLAMA,
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _MIXTRAL,
    "olmo": _olmo,
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "opt": _opt,
    "phi": _phi,
    "phi3": _PHI3,
    "qwen2": _LLAMA,
    "qwen3": _QWEN3,
    "qwen3_moe": _qwen3_moe,
    "smollm3": _smollm3,
    "stablelm": _stablelm,
    "starcoder2": _STARCODER2,
}
