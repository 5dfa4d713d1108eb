"""What runs on large models hold, send and compute, by the arithmetic of `trimfit plan`: the tables of docs/scale.md.

    python benchmarks/plan_table.py

128 windows of 2048 tokens, 16 of them held out, bfloat16, sparsity 50 %. Built from configs alone, in about a minute.
"""

from collections.abc import Mapping

import torch
from common import quiet
from synthetic import SHAPES, llama
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.configuration_utils import PreTrainedConfig

from trimfit import PruneConfig
from trimfit.models.outline import Outline, outline
from trimfit.pipelines.planning.plan import disk_bytes
from trimfit.pipelines.planning.prune_cost import Job

WINDOWS, HELD_OUT, LENGTH = 128, 16, 2048
MODELS: dict[str, PreTrainedConfig] = {
    "8B": SHAPES["Llama-3.1-8B"],
    "70B": llama(8192, 28672, 80, 64, 8, 128256),
    "405B": llama(16384, 53248, 126, 128, 8, 128256),
    "Mixtral 8x7B": MixtralConfig(),
    "Qwen3 30B-A3B": Qwen3MoeConfig(
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151936,
    ),
}
METHODS: Mapping[str, dict[str, str]] = {
    "Wanda + refit, layer": {"selector": "wanda", "target": "layer"},
    "joint + dense target": {"selector": "joint", "target": "dense"},
}


def main() -> None:
    quiet()
    outlines = {name: outline(config, torch.bfloat16, LENGTH) for name, config in MODELS.items()}
    jobs = {
        name: Job(PruneConfig.model_validate(method), WINDOWS - HELD_OUT, HELD_OUT, offload=True, gpu=True)
        for name, method in METHODS.items()
    }
    print("| model | block, GiB | weights, all / offloaded | states, Wanda / joint | work, Wanda / joint | disk |")
    print("|---" * 6 + "|")
    for name, model in outlines.items():
        wanda, joint = (job.memory(model) for job in jobs.values())
        block = max(block.bytes for block in model.blocks)
        held = (model.bytes, wanda.weights, wanda.states, joint.states, wanda.work, joint.work)
        pairs = [f"{a / 2**30:.3g} / {b / 2**30:.3g}" for a, b in zip(held[::2], held[1::2], strict=True)]
        disk = disk_bytes(model, jobs["joint + dense target"], None)
        print(f"| {name} | {block / 2**30:.2g} | {' | '.join(pairs)} | {disk / 2**30:.0f} |")
    print("\n| model | moments, GiB | masks and weights, GiB | whole model, GiB |")
    print("|---" * 4 + "|")
    for name, model in outlines.items():
        found = [_travel(model, job) for job in jobs.values()]
        moments, weights = ([one[i] / len(model.blocks) for one in found] for i in (0, 1))
        pairs = [f"{a / 2**30:.3g} / {b / 2**30:.3g}" for a, b in (moments, weights, [sum(one) for one in found])]
        print(f"| {name} | {' | '.join(pairs)} |")
    print("\n| model | method | forward, bf16 | float32 (Gram, mask, refit, errors) | float64 (factors) | files, TB |")
    print("|---" * 6 + "|")
    for name, model in outlines.items():
        for method, job in jobs.items():
            print(f"| {name} | {method} | {' | '.join(_operations(model, job))} |")


def _travel(model: Outline, job: Job) -> tuple[int, int]:
    """Bytes between processes: of second moments, and of masks and weights."""
    config, moments, weights = job.config, 0, 0
    for group in (group for block in model.blocks for group in block.groups):
        n, entries = group.inputs, sum(group.rows) * group.inputs
        beside = (model.hidden if group.adds else n) if config.target == "dense" else 0
        moments += 8 * n * (2 * (n + beside) + (n if config.split != "uniform" else 0))
        weights += entries * (1 + 4 + (4 if config.selector == "joint" else 0))  # joint has weights of its own
    return moments, weights


def _operations(model: Outline, job: Job) -> list[str]:
    """Pflop of each kind, and TB."""
    work = job.costs(model)
    kinds = {kind: sum(parts[kind] for parts in work.values()) for kind in ("model", "float32", "float64", "disk")}
    units = {"disk": 1e12}
    numbers = [amount / units.get(kind, 1e15) for kind, amount in kinds.items()]
    return [f"{number:.0f}" if number >= 10 else f"{number:.2g}" for number in numbers]


if __name__ == "__main__":
    main()
