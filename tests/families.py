"""Tiny random models of each family, built from their configs: nothing is downloaded."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

VOCABULARY = 64
LENGTH = 24
WINDOW = 8  # of local attention: shorter than the windows, so that local and global attention differ

_LLAMA_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_GPT2_SIZES: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_Q_K_V = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_MLP = (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))

Groups = tuple[tuple[str, ...], ...]
LLAMA_GROUPS: Groups = (_Q_K_V, ("self_attn.o_proj",), *_MLP)


@dataclass(frozen=True)
class Family:
    """How to build a tiny model of one family, and what must be found in it.

    - `name`: the `model_type` of its config.
    - `stack`: where the blocks are.
    - `groups`: names of the linear layers of each block, within it, by shared input, in the order of computation.
    - `options`: of the config, beside those that are the same for all.
    """

    name: str
    stack: str = "model.layers"
    groups: Groups = LLAMA_GROUPS
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def layers(self) -> set[str]:
        """Names of all linear layers within a block."""
        return {name for group in self.groups for name in group}

    def build(self, seed: int = 0, **options: Any) -> PreTrainedModel:
        """A model in evaluation mode whose every parameter is random: nothing is 0 or 1 as a fresh model's are."""
        torch.manual_seed(seed)
        tokens = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = AutoConfig.for_model(self.name, **{**tokens, **self.options, **options})
        model = AutoModelForCausalLM.from_config(config)
        randomise(model, seed)
        return model.eval()


def randomise(model: nn.Module, seed: int = 0) -> None:
    """Weights so large that attention is far from uniform; norms, biases and sinks moved from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.3)


def vision_language_model() -> PreTrainedModel:
    """Gemma 3 with its vision tower, whose blocks are as many as those of the text part."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Gemma3Config(
        text_config=FAMILIES["gemma3_text"].options | {"vocab_size": VOCABULARY, "pad_token_id": 0},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
        image_token_index=2,
    )
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(config)
    randomise(model)
    return model.eval()


def windows(count: int = 6, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Random token ids (count, length)."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def matrix(module: nn.Module) -> Tensor:
    """W (out, in) of a linear module, written independently of the library."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


@torch.no_grad()
def plain_inputs(model: PreTrainedModel, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """What each layer receives in a plain forward pass, (tokens, n) float64; several calls are put together."""
    caught: dict[str, list[Tensor]] = {name: [] for name in names}

    def catch(name: str) -> Callable[..., None]:
        return lambda module, arguments: caught[name].append(arguments[0].flatten(0, -2).double())

    handles = [model.get_submodule(name).register_forward_pre_hook(catch(name)) for name in names]
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in caught.items()}


def plain_grams(model: PreTrainedModel, tokens: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """XᵀX / T of each layer's inputs X in a plain forward pass."""
    return {name: x.T @ x / len(x) for name, x in plain_inputs(model, tokens, names).items()}


class InFloat64(TorchFunctionMode):
    """What transformers computes in float32 whatever the dtype (norms, softmax, routing), in float64 instead."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        exact = {torch.float32: torch.float64}
        args = tuple(exact.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {k: exact.get(v, v) if isinstance(v, torch.dtype) else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def make_word_tokenizer(size: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """One token for each of the words w0, w1, …; w0 pads, w1 begins and w2 ends a text."""
    words = {f"w{i}": i for i in range(size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _table(*families: Family) -> dict[str, Family]:
    return {family.name: family for family in families}


# The families that the library promises.
FAMILIES = _table(
    Family("llama", options=_LLAMA_SIZES),
    Family("mistral", options=_LLAMA_SIZES | {"sliding_window": WINDOW}),
    Family("qwen2", options=_LLAMA_SIZES),  # biases in q, k, v
    Family("qwen3", options=_LLAMA_SIZES | {"head_dim": 8}),  # norms of q and k
    Family(  # post-norms, soft caps, local and global attention in turn
        "gemma2",
        options=_LLAMA_SIZES
        | {
            "head_dim": 8,
            "sliding_window": WINDOW,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    Family(
        "gemma3_text",
        options=_LLAMA_SIZES
        | {
            "num_hidden_layers": 4,
            "head_dim": 8,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "query_pre_attn_scalar": 8,
        },
    ),
    Family(  # fused projections
        "phi3",
        groups=(("self_attn.qkv_proj",), ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        options=_LLAMA_SIZES,
    ),
    Family(
        "opt",
        stack="model.decoder.layers",
        groups=(_Q_K_V, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        options={
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "word_embed_proj_dim": 24,  # linear layers outside the blocks
            "max_position_embeddings": 64,
            "do_layer_norm_before": True,
        },
    ),
    Family(
        "gpt_neox",
        stack="gpt_neox.layers",
        groups=(
            ("attention.query_key_value",),
            ("attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        options={k: v for k, v in _LLAMA_SIZES.items() if k != "num_key_value_heads"},
    ),
    Family(  # Conv1D: weights stored transposed
        "gpt2",
        stack="transformer.h",
        groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        options=_GPT2_SIZES,
    ),
)

_MHA_SIZES = {k: v for k, v in _LLAMA_SIZES.items() if k != "num_key_value_heads"}
_FC = (("mlp.fc1",), ("mlp.fc2",))

# Families that no code of ours knows: what structure alone must get right.
MORE_FAMILIES = _table(
    Family("gemma", options=_LLAMA_SIZES | {"head_dim": 8}),
    Family("olmo", options=_LLAMA_SIZES),
    Family("olmo2", options=_LLAMA_SIZES),  # norms after attention and MLP only: the block's input is used raw
    Family("olmo3", options=_LLAMA_SIZES | {"sliding_window": WINDOW}),
    Family("granite", options=_LLAMA_SIZES | {"residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    Family("smollm3", options=_LLAMA_SIZES | {"no_rope_layers": [1, 0]}),
    Family(
        "glm4",
        groups=(_Q_K_V, ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
        options=_LLAMA_SIZES | {"head_dim": 8},
    ),
    Family("stablelm", options=_LLAMA_SIZES | {"use_qkv_bias": True}),
    Family(  # attention and MLP in parallel on one input
        "cohere",
        groups=((*_Q_K_V, "mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)),
        options=_LLAMA_SIZES,
    ),
    Family(
        "cohere2",
        groups=((*_Q_K_V, "mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)),
        options=_LLAMA_SIZES | {"num_hidden_layers": 4, "sliding_window": WINDOW, "head_dim": 8},
    ),
    Family(
        "starcoder2",
        groups=(_Q_K_V, ("self_attn.o_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        options=_LLAMA_SIZES,
    ),
    Family(
        "phi",
        groups=((*_Q_K_V, "mlp.fc1"), ("self_attn.dense",), ("mlp.fc2",)),
        options=_LLAMA_SIZES,
    ),
    Family(
        "gptj",
        stack="transformer.h",
        groups=(("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)),
        options=_GPT2_SIZES | {"rotary_dim": 4},
    ),
    Family(
        "gpt_neo",
        stack="transformer.h",
        groups=(
            ("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
            ("attn.attention.out_proj",),
            ("mlp.c_fc",),
            ("mlp.c_proj",),
        ),
        options={
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 48,
            "attention_types": [[["global", "local"], 1]],
            "window_size": WINDOW,
            "max_position_embeddings": 64,
        },
    ),
    Family(
        "gpt_bigcode",
        stack="transformer.h",
        groups=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
        options=_GPT2_SIZES,
    ),
    Family(
        "bloom",
        stack="transformer.h",
        groups=(
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        options={"hidden_size": 32, "n_layer": 2, "n_head": 4},
    ),
    Family(
        "falcon",
        stack="transformer.h",
        groups=(
            ("self_attention.query_key_value", "mlp.dense_h_to_4h"),
            ("self_attention.dense",),
            ("mlp.dense_4h_to_h",),
        ),
        options={"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    Family(
        "mpt",
        stack="transformer.blocks",
        groups=(("attn.Wqkv",), ("attn.out_proj",), ("ffn.up_proj",), ("ffn.down_proj",)),
        options={"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2},
    ),
    Family(
        "nemotron",
        groups=(_Q_K_V, ("self_attn.o_proj",), ("mlp.up_proj",), ("mlp.down_proj",)),
        options=_LLAMA_SIZES,
    ),
    Family(
        "persimmon",
        groups=(("self_attn.query_key_value",), ("self_attn.dense",), ("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
        options=_MHA_SIZES,
    ),
    Family(
        "codegen",
        stack="transformer.h",
        groups=(("attn.qkv_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",)),
        options=_GPT2_SIZES | {"rotary_dim": 4, "n_head": 4},
    ),
    Family(
        "biogpt",
        stack="biogpt.layers",
        groups=(_Q_K_V, ("self_attn.out_proj",), ("fc1",), ("fc2",)),
        options=_MHA_SIZES,
    ),
)
ALL_FAMILIES = FAMILIES | MORE_FAMILIES

EXPERTS = 4
_TWO_OF_THEM: dict[str, Any] = _LLAMA_SIZES | {"num_experts_per_tok": 2}
_NARROW: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": 16}
_LATENT: dict[str, Any] = _TWO_OF_THEM | {  # the first block has no experts, the second has
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
}


def _experts(holder: str = "mlp.experts") -> Groups:
    """First the first layers of all experts, then the second ones."""
    return tuple((f"{holder}.{i}.{name}",) for name in ("gate_up_proj", "down_proj") for i in range(EXPERTS))


_ATTENTION: Groups = (_Q_K_V, ("self_attn.o_proj",))
_LATENT_ATTENTION: Groups = (
    ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
    ("self_attn.q_b_proj",),
    ("self_attn.kv_b_proj",),
    ("self_attn.o_proj",),
)


def _shared_expert(holder: str) -> Groups:
    return ((f"{holder}.gate_proj", f"{holder}.up_proj"), (f"{holder}.down_proj",))


# Mixtures of experts. Experts are no modules, so their layers are not found under their names; `groups` are those of
# the last block.
EXPERT_FAMILIES = _table(
    Family("mixtral", groups=_ATTENTION + _experts(), options=_TWO_OF_THEM | {"num_local_experts": EXPERTS}),
    Family("qwen3_moe", groups=_ATTENTION + _experts(), options=_TWO_OF_THEM | _NARROW | {"head_dim": 8}),
    Family(
        "qwen2_moe",
        groups=_ATTENTION + _shared_expert("mlp.shared_expert") + _experts(),
        options=_TWO_OF_THEM | _NARROW | {"shared_expert_intermediate_size": 24},
    ),
    Family("olmoe", groups=_ATTENTION + _experts(), options=_TWO_OF_THEM | {"num_experts": EXPERTS}),
    Family(
        "deepseek_v2",
        groups=_LATENT_ATTENTION + _experts() + _shared_expert("mlp.shared_experts"),
        options=_LATENT,
    ),
    Family(
        "deepseek_v3",
        groups=_LATENT_ATTENTION + _experts() + _shared_expert("mlp.shared_experts"),
        options=_LATENT,
    ),
    Family(  # weights stored transposed, with biases, rows of gate and up in turn
        "gpt_oss",
        groups=_ATTENTION + _experts(),
        options=_TWO_OF_THEM
        | {"num_local_experts": EXPERTS, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    ),
    Family(
        "granitemoe",
        groups=_ATTENTION + _experts("block_sparse_moe.experts"),
        options=_TWO_OF_THEM | {"num_local_experts": EXPERTS},
    ),
    Family("phimoe", groups=_ATTENTION + _experts(), options=_TWO_OF_THEM | {"num_local_experts": EXPERTS}),
)


@torch.no_grad()
def plain_expert_inputs(model: PreTrainedModel, tokens: Tensor, holder: str) -> dict[str, Tensor]:
    """What each expert's layers receive in a plain forward pass, (tokens, n) float64, written from the definition.

    `holder` is the name of the module that holds the experts; names are those of the layers within the model.
    """
    experts = model.get_submodule(holder)
    caught: list[tuple[Tensor, ...]] = []
    handle = experts.register_forward_pre_hook(lambda module, arguments: caught.append(arguments))
    model(input_ids=tokens, use_cache=False)
    handle.remove()
    ((hidden, chosen, _),) = caught
    inputs: dict[str, Tensor] = {}
    for i in range(EXPERTS):
        x = hidden[(chosen == i).any(1)].double()
        weight = experts.get_parameter("gate_up_proj")[i].double()
        if model.config.model_type == "gpt_oss":
            both = x @ weight + experts.get_parameter("gate_up_proj_bias")[i].double()
            gate, up = both[:, 0::2].clamp(max=7), both[:, 1::2].clamp(-7, 7)
            units = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        else:
            gate, up = (x @ weight.T).chunk(2, 1)
            units = nn.functional.silu(gate) * up
        inputs |= {f"{holder}.{i}.gate_up_proj": x, f"{holder}.{i}.down_proj": units}
    return inputs


def _variant(name: str, groups: Groups | None = None, **options: Any) -> Family:
    family = ALL_FAMILIES[name]
    return Family(name, family.stack, groups or family.groups, family.options | options)


# Other forms of the same families, as their checkpoints come: other masks, positions and wiring.
VARIANTS = {
    "llama-biases": _variant("llama", attention_bias=True, mlp_bias=True),
    "llama-eager": _variant("llama", attn_implementation="eager"),
    "llama-tied": _variant("llama", tie_word_embeddings=True),
    "llama-scaled-positions": _variant(
        "llama",
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "gemma2-eager": _variant("gemma2", attn_implementation="eager"),
    "gemma3-eager": _variant("gemma3_text", attn_implementation="eager"),
    "qwen2-some-local": _variant("qwen2", use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "phi3-local": _variant("phi3", sliding_window=WINDOW, partial_rotary_factor=0.5),
    "opt-350m": _variant("opt", do_layer_norm_before=False),
    "gpt2-eager": _variant("gpt2", attn_implementation="eager", scale_attn_by_inverse_layer_idx=True),
    "gpt_neox-sequential": _variant("gpt_neox", use_parallel_residual=False),
    "stablelm-parallel": _variant(
        "stablelm",
        ((*_Q_K_V, "mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",), ("mlp.down_proj",)),
        use_parallel_residual=True,
        qk_layernorm=True,
    ),
    "falcon-40b": _variant(
        "falcon",
        (
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        new_decoder_architecture=True,
        num_kv_heads=2,
    ),
    "falcon-rw": _variant(
        "falcon",
        (
            ("self_attention.query_key_value",),
            ("self_attention.dense",),
            ("mlp.dense_h_to_4h",),
            ("mlp.dense_4h_to_h",),
        ),
        alibi=True,
        parallel_attn=False,
        multi_query=False,
        bias=True,
    ),
}
EVERYTHING = ALL_FAMILIES | VARIANTS

# Whose attention is called, or changes what Q and K give, in a way that no other family's is.
OWN_ATTENTION = _table(
    _variant("olmo", clip_qkv=1.0),
    Family(
        "afmoe",
        options=_LLAMA_SIZES | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    ),
    Family(
        "minimax_m3_vl_text",
        options=_LLAMA_SIZES
        | {
            "head_dim": 8,
            "rotary_dim": 8,
            "layer_types": ["full_attention", "minimax_m3_sparse"],
            "mlp_layer_types": ["dense", "dense"],
            "dense_intermediate_size": 48,
            "num_local_experts": EXPERTS,
            "num_experts_per_tok": 2,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_block_size": 4,
            "index_topk_blocks": 2,
        },
    ),
)


def for_each(families: dict[str, Family]) -> pytest.MarkDecorator:
    """Runs a test once for each family, as the argument `family`."""
    # transformers scripts the activations of GPT-BigCode when it is imported.
    scripted = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
    parameters = [
        pytest.param(family, id=name, marks=[scripted] if name == "gpt_bigcode" else [])
        for name, family in families.items()
    ]
    return pytest.mark.parametrize("family", parameters)
