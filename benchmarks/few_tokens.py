"""How much damping a Gram matrix of few tokens wants, as an expert's is, and whether such a refit is worth it.

    python benchmarks/few_tokens.py

Layers of the embedded model are pruned to 50 % by Wanda and refitted on T tokens drawn at random, for T from 1/16
of a layer's inputs n to 8 times as many, with λ = 0.01·max(1, c·n/T). Errors are on 2048 other tokens, as a multiple of
that with the best λ of a grid, the geometric mean over four layers. `masked` is the mask of c = 8, without refit.
Prints a Markdown table.
"""

import math

import torch
from common import quiet
from torch import Tensor

from trimfit import CalibrationConfig, PruneConfig, load_checkpoint
from trimfit.demo.run import model_path
from trimfit.masks import SELECTORS
from trimfit.refit import Auto, FactoredGram, refit

LAYERS = [f"model.layers.{block}.mlp.{name}_proj" for block in (1, 4) for name in ("gate", "down")]
RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8)
FACTORS = (0, 2, 4, 8, 16, 32)
GRID = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
HELD_OUT = 2048
PATTERN = PruneConfig(sparsity=0.5, selector="wanda").mask_pattern


@torch.no_grad()
def inputs() -> dict[str, tuple[Tensor, Tensor]]:
    """Of each layer: W (out, in), and its inputs (tokens, in) in random order."""
    checkpoint = load_checkpoint(str(model_path()))
    model = checkpoint.model
    windows = CalibrationConfig(samples=32, sequence_length=256).windows(checkpoint.tokenizer, model)
    caught: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name in LAYERS:
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, arguments, name=name: caught[name].append(arguments[0].flatten(0, -2).float())
        )
    model(input_ids=windows, use_cache=False)
    order = torch.randperm(windows.numel(), generator=torch.Generator().manual_seed(0))
    return {
        name: (model.get_parameter(f"{name}.weight").float(), torch.cat(parts)[order]) for name, parts in caught.items()
    }


def errors(weight: Tensor, x: Tensor, test: Tensor, damping: float) -> tuple[float, float]:
    """Relative errors on `test`, (tokens, in) as `x`: refitted, and with the mask alone."""
    gram = FactoredGram(x.T @ x / len(x), damping)
    mask = SELECTORS["wanda"].select(weight, gram, PATTERN).mask
    refitted = refit(gram, weight, mask, solver=Auto(1e-3)).weight
    energy = (test @ weight.T).square().sum()
    refit_error, mask_error = (
        ((test @ (w - weight).T).square().sum() / energy).item() for w in (refitted, torch.where(mask, weight, 0))
    )
    return refit_error, mask_error


def row(layers: dict[str, tuple[Tensor, Tensor]], ratio: float) -> list[float]:
    """Errors for each of `FACTORS`, and with the mask alone, as multiples of the best."""
    logs: list[list[float]] = []
    for weight, x in layers.values():
        tokens = int(ratio * weight.shape[1])
        if tokens > len(x) - HELD_OUT:
            continue
        known, test = x[:tokens], x[-HELD_OUT:]
        best = min(errors(weight, known, test, damping)[0] for damping in GRID)
        found = [errors(weight, known, test, 0.01 * max(1.0, factor / ratio)) for factor in FACTORS]
        ours = [*(refitted for refitted, _ in found), found[FACTORS.index(8)][1]]
        logs.append([math.log(error / best) for error in ours])
    return [math.exp(sum(column) / len(column)) for column in zip(*logs, strict=True)]


def main() -> None:
    quiet()
    layers = inputs()
    print("| T/n |", " | ".join(["λ = 0.01", *(f"c = {factor}" for factor in FACTORS[1:]), "masked"]), "|")
    print("|---|" + "---|" * (len(FACTORS) + 1))
    for ratio in RATIOS:
        print(f"| {ratio:g} |", " | ".join(f"{value:.2f}" for value in row(layers, ratio)), "|", flush=True)


if __name__ == "__main__":
    main()
