"""Folds into a block the transformations that make it easier to quantize and cost nothing at inference."""

from collections.abc import Iterable

import torch
from torch import Tensor

from trimfit.models import Folds, HiddenScale, InputScale, ValueOutput
from trimfit.pipelines.quantizing.config import QuantizeConfig
from trimfit.quant import Grid, place_levels
from trimfit.quant.balance import balance_columns
from trimfit.quant.pairs import balanced_transform, paper_transform

Weights = dict[str, Tensor]

_PRUNED = 0.01  # share of zeros from which on a layer counts as pruned


def is_pruned(weight: Tensor) -> bool:
    """Whether the zeros of a weight are a pattern to keep."""
    return (weight == 0).float().mean().item() > _PRUNED


def fold_block(folds: Folds, weights: Weights, config: QuantizeConfig) -> tuple[dict[str, list[str]], list[str]]:
    """Transforms `weights` (float32 copies by the layer's name) in place, and the norms and biases in the model.

    **Returns** the names of the folds by layer, and why some were left out, a sentence each.
    """
    done: dict[str, list[str]] = {name: [] for name in weights}
    left_out: list[str] = []
    if config.transform == "free":
        for scale in folds.inputs:
            _note(done, balance_inputs(scale, weights), "balance")
        for scale in folds.hidden:
            _note(done, balance_hidden(scale, weights), "balance")
    if config.transform in ("free", "pairs", "paper"):
        for pair in folds.pairs:
            names = {pair.value_layer.name, pair.output_layer.name}
            if not names <= weights.keys():
                left_out.append("a V/O pair keeps its basis: one of the two is not quantized")
            elif any(is_pruned(weights[name]) for name in names):
                left_out.append("V/O pairs keep their basis: mixing heads would fill the zeros of a pruned model")
            else:
                _note(done, transform_pair(pair, folds, weights, config), "pair")
    return done, left_out


def _note(done: dict[str, list[str]], names: Iterable[str], what: str) -> None:
    for name in names:
        done[name].append(what)


def balance_inputs(scale: InputScale, weights: Weights) -> tuple[str, ...]:
    """Column balance between a norm and its readers, if all of them are quantized."""
    if not set(scale.readers) <= weights.keys():
        return ()
    factors = scale.storable(balance_columns([weights[name] for name in scale.readers]))
    scale.scale_norm(factors)
    for name in scale.readers:
        weights[name] /= factors.to(weights[name])
    return scale.readers


def balance_hidden(scale: HiddenScale, weights: Weights) -> tuple[str, ...]:
    """Column balance of down, made up for by the rows of up."""
    up, down = scale.up_layer.name, scale.down_layer.name
    if not {up, down} <= weights.keys():
        return ()
    factors = balance_columns([weights[down]])
    scale.scale_bias(factors)
    weights[up][scale.up_rows] *= factors[:, None]
    weights[down] /= factors
    return up, down


def transform_pair(pair: ValueOutput, folds: Folds, weights: Weights, config: QuantizeConfig) -> tuple[str, ...]:
    """A new basis for each KV head, kept if it brings the rounded product nearer to the exact one, or asked for."""
    value, output = weights[pair.value_layer.name], weights[pair.output_layer.name]
    a, b = pair.gather(value, output)
    energy = _input_energy(pair, folds, b)
    m = paper_transform(a, b) if config.transform == "paper" else balanced_transform(a, b, energy)
    new_a = torch.linalg.solve(m, a.to(m), left=False)
    new_value, new_output = value.clone(), output.clone()
    pair.scatter(new_a, m @ b.to(m), new_value, new_output)
    if config.transform == "free":
        before = _product_error(pair, value, output, energy, config.grid)
        if _product_error(pair, new_value, new_output, energy, config.grid) > before:
            return ()
    bias = pair.bias(m.dtype)
    if bias is not None:
        pair.write_bias((m @ bias[..., None])[..., 0])
    weights[pair.value_layer.name], weights[pair.output_layer.name] = new_value, new_output
    return pair.value_layer.name, pair.output_layer.name


def _input_energy(pair: ValueOutput, folds: Folds, like: Tensor) -> Tensor:
    """(n,) what the norm before V says of the mean squares of its inputs."""
    for scale in folds.inputs:
        if pair.value_layer.name in scale.readers:
            return scale.effective_weight().square().to(like)
    return torch.ones(like.shape[-1]).to(like)


def _product_error(pair: ValueOutput, value: Tensor, output: Tensor, energy: Tensor, grid: Grid) -> float:
    """Σ over heads ‖(A B − Â B̂) diag(energy)^{1/2}‖² with both rounded to nearest."""
    a, b = pair.gather(value, output)
    rounded = pair.gather(_rounded(value, grid), _rounded(output, grid))
    heads = zip(a, b, *rounded, strict=True)  # one by one: a product may be larger than both layers together
    return sum(((a @ b - c @ d) * energy.sqrt()).square().sum().item() for a, b, c, d in heads)


def _rounded(weight: Tensor, grid: Grid) -> Tensor:
    return place_levels(weight, grid.fitted(weight.shape[1])).nearest(weight).dequantize()
