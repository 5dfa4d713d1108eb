"""What online transformations cost at inference: multiply-adds from shapes alone, and tokens per second of a model.

    python benchmarks/online_cost.py [--model demo] [--runs 15]

T⁻¹ x is computed once for all layers that share x, in blocks of at most 64 or 128. Of the large models only the shapes
are used, no weights. Times of the three forms are taken in turn, and the ratios round by round, so they hold when the
machine's speed drifts. Prints Markdown tables.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import machine, quiet
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimfit.checkpoints.load import load
from trimfit.checkpoints.online import InputTransform
from trimfit.demo.run import model_path
from trimfit.models import find_blocks
from trimfit.pipelines import QuantizeConfig, quantize_checkpoint
from trimfit.quant.blocks import block_size

_LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8, "num_attention_heads": 32}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama-3.1-8B": ("llama", _LLAMA | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}),
    "Gemma-2-9B": (
        "gemma2",
        {
            "vocab_size": 256000,
            "hidden_size": 3584,
            "intermediate_size": 14336,
            "num_hidden_layers": 42,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 256,
        },
    ),
    "Llama-3.2-1B": ("llama", _LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}),
}
FOLLOWERS = ("k_proj", "v_proj", "up_proj")  # of these models: what reads the input of another layer
PREFILL, DECODED, PROMPT = 512, 64, 64  # tokens


def shares(family: str, options: dict[str, Any], largest: int) -> tuple[float, float, float]:
    """T⁻¹ x for one token, shared; the same where each layer computes its own; both relative to the linear layers of
    the blocks. And the first relative to these layers and the output head."""
    count = options["num_hidden_layers"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options | {"num_hidden_layers": 1}))
    (block,) = find_blocks(model)
    linear = sum(layer.weight.numel() for layer in block.layers)
    own = {layer.name: (width := layer.weight.shape[1]) * block_size(width, largest) for layer in block.layers}
    shared = sum(cost for name, cost in own.items() if not name.endswith(FOLLOWERS))
    head = model.get_output_embeddings().weight.numel()
    return shared / linear, sum(own.values()) / linear, shared * count / (linear * count + head)


def prefill(model: PreTrainedModel) -> float:
    """Tokens per second."""
    tokens = torch.randint(model.config.vocab_size, (1, PREFILL), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    with torch.no_grad():
        model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    return PREFILL / (time.perf_counter() - start)


def decode(model: PreTrainedModel) -> float:
    """Tokens per second, one after the other with a cache; the prompt is not timed."""
    tokens = torch.randint(model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=1)
        start = time.perf_counter()
        for _ in range(DECODED):
            token = output.logits[:, -1].argmax(-1, keepdim=True)
            output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        return DECODED / (time.perf_counter() - start)


def forms(source: str, directory: Path) -> dict[str, PreTrainedModel]:
    """The same quantized model without transformations at run time, with shared ones, and with one for each layer."""
    config = QuantizeConfig(transform="online", bits=4, group_size=64, block_size=64, rounding="nearest")
    path = str(model_path()) if source == "demo" else source
    report = quantize_checkpoint(path, directory / "out", config, device=torch.device("cpu"))
    print(f"{source}, blocks of 64: T⁻¹ x is {report.online_multiply_adds:.2%} of the multiply-adds of the layers.\n")
    alone = load(directory / "out")
    for module in alone.modules():
        if isinstance(module, InputTransform):
            module.readers = 1
    return {
        "merged into the weights": load(directory / "out", merged=True),
        "once for each input": load(directory / "out"),
        "once for each layer": alone,
    }


def measure(models: dict[str, PreTrainedModel], speed: Callable[[PreTrainedModel], float], runs: int) -> None:
    """Prints the rows of one table."""
    rounds = [{name: speed(model) for name, model in models.items()} for _ in range(runs + 1)][1:]  # the first warms up
    first = next(iter(models))
    for name in models:
        speeds, times = ([r[name] for r in rounds], [r[first] / r[name] for r in rounds])
        low, _, high = statistics.quantiles(times, n=4)
        print(
            f"| {speed.__name__} | {name} | {statistics.median(speeds):.0f} "
            f"| {statistics.median(times):.2f} ({low:.2f} to {high:.2f}) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="directory with a context of at least 512 tokens")
    parser.add_argument("--runs", type=int, default=15)
    arguments = parser.parse_args()
    quiet()
    print(machine())
    print("\n| model | blocks | T⁻¹ x, of the layers | of layers and head | if not shared | bits for each weight |")
    print("|---|---|---|---|---|---|")
    for name, (family, options) in SHAPES.items():
        for largest in (64, 128):
            shared, alone, whole = shares(family, options, largest)
            print(f"| {name} | {largest} | {shared:.2%} | {whole:.2%} | {alone:.2%} | {32 * shared:.2f} |")
    print("\nBits: of T⁻¹ as it is stored, in float32.\n")
    with tempfile.TemporaryDirectory() as directory:
        models = forms(arguments.model, Path(directory))
    print("| | T⁻¹ x | tokens/s | time relative to merged |")
    print("|---|---|---|---|")
    for speed in (prefill, decode):
        measure(models, speed, arguments.runs)


if __name__ == "__main__":
    main()
