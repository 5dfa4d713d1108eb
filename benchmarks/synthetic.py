"""Models from a config with seeded weights: nothing is downloaded.

Their activations are made to look like those of trained models, on which pruning and its solvers depend:
- spectra: embeddings, and what o_proj and down_proj add to the residual stream, have variance 1/k along the k-th of
  d orthogonal directions, so a few directions hold most of the energy and Gram matrices are badly conditioned;
- outliers: one channel in 256 of the residual stream is 20 times as large, norms have log-normal weights, and rows of
  gate_proj and up_proj are log-normal, so that some inputs of down_proj are far above the others;
- tokens follow Zipf's law.

    python benchmarks/synthetic.py DIRECTORY [--hidden 256 --blocks 4 ...]     writes one, with a tokenizer, in shards
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, MixtralConfig, PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

_ADDS = ("o_proj", "down_proj")  # to the residual stream
_GATES = ("gate_proj", "up_proj", "gate_up_proj")
_SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(
    hidden: int, intermediate: int, blocks: int, heads: int, kv_heads: int, vocabulary: int, **more: Any
) -> LlamaConfig:
    """A Llama of these sizes."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocabulary,
        max_position_embeddings=8192,
        **_SPECIAL,
        **more,
    )


# The shapes of known models, and one for tests.
SHAPES: dict[str, PreTrainedConfig] = {
    "tiny": llama(64, 128, 2, 4, 2, 128),
    "100M": llama(768, 2048, 12, 12, 12, 16000, tie_word_embeddings=True),
    "experts": MixtralConfig(  # 113M parameters, 100M of them in experts
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        vocab_size=8000,
        **_SPECIAL,
    ),
    "Llama-3.2-1B": llama(2048, 8192, 16, 32, 8, 128256, tie_word_embeddings=True),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128256),
    "Gemma-2-9B": Gemma2Config(
        hidden_size=3584,
        intermediate_size=14336,
        num_hidden_layers=42,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=256,
        vocab_size=256000,
        **_SPECIAL,
    ),
}


def build(config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> PreTrainedModel:
    """The model on `device`, always with the same weights on the same device."""
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, seed)
    return model.eval()


@torch.no_grad()
def fill(model: PreTrainedModel, seed: int = 0) -> None:
    """Gives a model the weights that this module tells of."""
    device = model.device
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    d = model.config.hidden_size
    directions = torch.linalg.qr(normal(d, d)).Q
    spread = torch.arange(1, d + 1, device=device) ** -0.5
    spread /= spread.square().mean().sqrt()
    outlier = torch.ones(d, device=device)
    outlier[torch.randperm(d, generator=generator, device=device)[: -(-d // 256)]] = 20

    def stream(rows: int) -> Tensor:  # (rows, d) points of the residual stream
        return (normal(rows, d) * spread) @ directions * outlier

    shift = 1.0 if model.config.model_type.startswith("gemma") else 0.0  # whose norms multiply by 1 + w
    for name, parameter in model.named_parameters():
        *_, module, own = name.split(".")
        if "embed" in module:
            parameter.copy_(torch.cat([stream(len(rows)) for rows in parameter.split(2**14)]))
        elif parameter.dim() == 1:
            parameter.copy_(torch.exp(0.3 * normal(len(parameter))) - shift)
        else:
            layer = own if parameter.dim() == 3 else module  # experts are slices of one parameter
            for weight in parameter if parameter.dim() == 3 else [parameter]:
                if layer in _ADDS:
                    weight.copy_(0.3 * stream(weight.shape[1]).T / weight.shape[1] ** 0.5)
                else:
                    rows = torch.exp(0.5 * normal(len(weight), 1)) if layer in _GATES else 1.0
                    weight.copy_(normal(*weight.shape) * rows / weight.shape[1] ** 0.5)


def tokens(config: PreTrainedConfig, windows: int, length: int, seed: int = 0) -> Tensor:
    """(windows, length) int64 token ids."""
    frequency = 1 / torch.arange(3, config.vocab_size, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(frequency, windows * length, replacement=True, generator=generator)
    return drawn.view(windows, length) + 3


def save(model: PreTrainedModel, directory: Path, shard_size: str) -> None:
    """Writes a model, in shards, with a tokenizer that fits."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model.save_pretrained(directory, max_shard_size=shard_size)
    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w0"))
    special = {"unk_token": "w0", "pad_token": "w0", "bos_token": "w1", "eos_token": "w2"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(directory)


def main() -> None:
    import numpy as np
    from common import quiet

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, help="of a known model; or give the sizes")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--intermediate", type=int, default=768)
    parser.add_argument("--blocks", type=int, help="4 by default; only so many of those of the known model")
    parser.add_argument("--vocabulary", type=int, default=2000)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--shard-size", default="10MB")
    a = parser.parse_args()
    quiet()
    config = SHAPES[a.shape] if a.shape else llama(a.hidden, a.intermediate, a.blocks or 4, 4, 2, a.vocabulary)
    config.num_hidden_layers = a.blocks or config.num_hidden_layers
    save(build(config, torch.float32, torch.device("cpu")), a.directory, a.shard_size)
    np.save(a.directory / "tokens.npy", tokens(config, a.windows, a.length).numpy())


if __name__ == "__main__":
    main()
