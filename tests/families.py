"""Tiny random models of each family, built from their configs: nothing is downloaded."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
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
    """Weights large enough for attention to be far from uniform; norms, biases and sinks moved from where they start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() >= 2:
                parameter.copy_(noise * 0.2)
            else:
                parameter.add_(noise * 0.3)


def windows(count: int = 6, length: int = LENGTH, seed: int = 1) -> Tensor:
    """Random token ids (count, length)."""
    return torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed))


def matrix(module: nn.Module) -> Tensor:
    """W (out, in) of a linear module, written independently of the library."""
    weight = module.get_parameter("weight").detach()
    return weight.T if isinstance(module, Conv1D) else weight


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
    Family("glm4", groups=(_Q_K_V, ("self_attn.o_proj",), ("mlp.gate_up_proj",), ("mlp.down_proj",)),
           options=_LLAMA_SIZES | {"head_dim": 8}),
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
