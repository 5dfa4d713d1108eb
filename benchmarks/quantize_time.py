"""How long quantization takes beside round-to-nearest with clip search, on a Llama built from config.

    python benchmarks/quantize_time.py --hidden 1024 --intermediate 2816 --blocks 2

Weights are random: the time does not depend on their values. Modes are interleaved, medians of the rounds, with as many
threads as torch is set to. Prints a Markdown table.
"""

import argparse
import statistics
import time

import torch
from common import machine, quiet
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import trimfit

MODES: dict[str, dict[str, str]] = {
    "round to nearest, clip search": {"transform": "none", "rounding": "nearest"},
    "free, nearest": {"transform": "free", "rounding": "nearest"},
    "free": {"transform": "free", "rounding": "alternating"},
    "online": {"transform": "online", "rounding": "alternating"},
}


def build(hidden: int, intermediate: int, blocks: int) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=hidden // 128 or 1,
        num_key_value_heads=max(1, hidden // 512),
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=2816)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    quiet()
    device = torch.device(arguments.device)
    model = build(arguments.hidden, arguments.intermediate, arguments.blocks).to(device)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seconds: dict[str, list[float]] = {name: [] for name in MODES}
    for number in range(arguments.rounds + 1):  # the first warms up
        for name, options in MODES.items():
            model.load_state_dict(state)
            config = trimfit.QuantizeConfig.model_validate({"bits": arguments.bits, **options})
            start = time.perf_counter()
            trimfit.quantize(model, config)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - start)
    base = statistics.median(seconds["round to nearest, clip search"])
    weights = sum(layer.numel() for layer in state.values())
    print(
        f"{machine()}\n\n{weights / 1e6:.0f}M weights, {arguments.blocks} blocks, hidden {arguments.hidden}, ffn",
        end=" ",
    )
    print(f"{arguments.intermediate}; {arguments.bits} bit, groups of 128\n\n| mode | seconds | ratio |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {statistics.median(times):.2f} | {statistics.median(times) / base:.2f} |")


if __name__ == "__main__":
    main()
