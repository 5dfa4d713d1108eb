"""Transformations that can be folded into a block's weights without changing what the model computes.

A fold knows where it fits and how it is undone on the other side; which transformation is a good one it does not know.
Every fold is exact but for the rounding of what is stored in the model's dtype. Callers that work on the matrices in
copies of their own store the rest with `scale_norm`, `scale_bias` and `write_bias`. Vectors of norms and factors are
float64, or float32 on devices that have no float64. Rows and columns are int64, on the CPU.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimfit.errors import InputError
from trimfit.models.structure import Layer


@dataclass(frozen=True, eq=False)
class InputScale:
    """A norm, whose output takes a factor t > 0 per channel, and all layers that read it, whose columns are divided.

    - `norm`: the norm's name.
    - `module`: the norm: a weight (n,), and a bias (n,) or none.
    - `offset`: what the norm adds to its weight before it multiplies by it: 1 in Gemma, else 0.
    - `layers`: all that read the norm's output, each (out, n).
    """

    norm: str
    module: nn.Module
    offset: float
    layers: tuple[Layer, ...]

    @property
    def readers(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def reader_weights(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Copies of the layers' weights, (out, n) each."""
        return [layer.weight.to(dtype, copy=True) for layer in self.layers]

    def effective_weight(self) -> Tensor:
        """γ (n,), what the norm multiplies by."""
        return self._effective(self.module.get_parameter("weight").detach())

    def storable(self, t: Tensor) -> Tensor:
        """The factors (n,) nearest to `t` (n,) for which the norm's dtype holds γ·t without another rounding.

        They are γ'/γ, where γ' is what γ·t becomes when it is stored, and 1 where either is 0. The bias of a norm, if
        it has one, is still rounded. Raises `InputError` for a `t` that is not positive.
        """
        gamma = self.effective_weight()
        stored = self._effective(self._stored(gamma * _factors(t, gamma, self.norm)))
        usable = (gamma != 0) & (stored != 0) & stored.isfinite()
        return torch.where(usable, stored / torch.where(usable, gamma, 1.0), 1.0)

    @torch.no_grad()
    def scale_norm(self, t: Tensor) -> None:
        """The norm's half of `apply`, for callers that divide the columns of the layers themselves."""
        gamma = self.effective_weight()
        t = _factors(t, gamma, self.norm)
        self.module.get_parameter("weight").copy_(self._stored(gamma * t))
        bias = _bias(self.module)
        if bias is not None:
            bias.copy_(_precise(bias) * t)

    def apply(self, t: Tensor) -> None:
        """Folds the factors `t` (n,) into the model. Raises `InputError` for a `t` that is not positive."""
        self.scale_norm(t)
        for layer in self.layers:
            weight = _precise(layer.weight)
            layer.write(weight / t.to(weight))

    def _stored(self, gamma: Tensor) -> Tensor:
        return (gamma - self.offset).to(self.module.get_parameter("weight").dtype)

    def _effective(self, weight: Tensor) -> Tensor:
        # Norms with an offset add it in float32, where small weights are lost beside 1.
        at_least = torch.promote_types(weight.dtype, torch.float32)
        return _precise(weight.to(at_least) + self.offset)


@dataclass(frozen=True, eq=False)
class HiddenScale:
    """The hidden units of an MLP, each of which takes a factor c > 0 that the next layer divides by.

    - `up_layer`, `up_rows` (ffn,): its rows that make the hidden units; in a fused layer the others make the gate.
    - `down_layer`: reads the hidden units, (out, ffn).
    """

    up_layer: Layer
    up_rows: Tensor
    down_layer: Layer

    def up_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of the rows that make the hidden units, (ffn, n)."""
        return self.up_layer.weight[self.up_rows].to(dtype)

    def down_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """A copy of the weights that read the hidden units, (out, ffn)."""
        return self.down_layer.weight.to(dtype, copy=True)

    @torch.no_grad()
    def scale_bias(self, c: Tensor) -> None:
        """The biases' part of `apply`, for callers that scale rows and columns themselves."""
        bias = _bias(self.up_layer.module)
        if bias is not None:
            values = _precise(bias[self.up_rows])
            bias[self.up_rows] = (values * _factors(c, values, self.up_layer.name)).to(bias)

    def apply(self, c: Tensor) -> None:
        """Folds the factors `c` (ffn,) into the model. Raises `InputError` for a `c` that is not positive."""
        up, down = _precise(self.up_layer.weight), _precise(self.down_layer.weight)
        c = _factors(c, down[0], self.up_layer.name)
        up[self.up_rows] *= c[:, None]
        self.scale_bias(c)
        self.up_layer.write(up)
        self.down_layer.write(down / c)


@dataclass(frozen=True, eq=False)
class ValueOutput:
    """The values of each KV head, which take any invertible matrix M (r, r) that the output projection undoes.

    In the words of `pairs`: B (r, n) are a head's V rows, A (g·d, r) the O columns of its g query heads, stacked. Each
    query head contributes (its part of A) · B, which stays as it is with A M⁻¹ and M B.

    - `value_layer`, `value_rows` (kv_heads, r): V, and the rows of each head in it.
    - `output_layer`, `output_columns` (kv_heads, g, r): O, and its columns for each query head of each KV head.
    """

    value_layer: Layer
    value_rows: Tensor
    output_layer: Layer
    output_columns: Tensor

    def gather(self, value: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """A (kv_heads, g·d, r) and B (kv_heads, r, n), copied out of the weights (out, in) of both layers."""
        heads, group, r = self.output_columns.shape
        a = output[:, self.output_columns].permute(1, 2, 0, 3).reshape(heads, group * len(output), r)
        return a, value[self.value_rows]

    def scatter(self, a: Tensor, b: Tensor, value: Tensor, output: Tensor) -> None:
        """Puts A and B back into the weights (out, in) of both layers, in place."""
        heads, group, r = self.output_columns.shape
        columns = a.reshape(heads, group, len(output), r).permute(2, 0, 1, 3)
        value[self.value_rows] = b.to(value)
        output[:, self.output_columns] = columns.to(output)

    def bias(self, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """A copy of the biases of V, (kv_heads, r), if it has any."""
        bias = _bias(self.value_layer.module)
        return None if bias is None else bias.detach()[self.value_rows].to(dtype)

    def pairs(self, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor | None]:
        """A (kv_heads, g·d, r), B (kv_heads, r, n) and the biases (kv_heads, r) or None, copied."""
        a, b = self.gather(self.value_layer.weight, self.output_layer.weight)
        return a.to(dtype), b.to(dtype), self.bias(dtype)

    @torch.no_grad()
    def write_bias(self, bias: Tensor | None) -> None:
        """Stores the biases of V (kv_heads, r). Raises `InputError` for None when V has some, and the reverse."""
        own = _bias(self.value_layer.module)
        if (own is None) != (bias is None):
            raise InputError(f"{self.value_layer.name} has {'no' if own is None else 'a'} bias, unlike what is written")
        if own is not None and bias is not None:
            own[self.value_rows] = bias.to(own)

    def write(self, a: Tensor, b: Tensor, bias: Tensor | None) -> None:
        """Stores what `pairs` gives, changed or not, rounded to the model's dtype.

        Raises `InputError` for biases that are None when V has some, and the reverse.
        """
        self.write_bias(bias)
        value, output = self.value_layer.weight.clone(), self.output_layer.weight.clone()
        self.scatter(a, b, value, output)
        self.value_layer.write(value)
        self.output_layer.write(output)

    def apply(self, m: Tensor) -> None:
        """Folds one M for each KV head, `m` (kv_heads, r, r), into the model.

        Raises `InputError` for matrices that are not finite or cannot be inverted.
        """
        a, b = self.gather(_precise(self.value_layer.weight), _precise(self.output_layer.weight))
        heads, r = self.value_rows.shape
        if m.shape != (heads, r, r):
            raise InputError(f"{self.value_layer.name} takes matrices {(heads, r, r)}, but these are {tuple(m.shape)}")
        m = m.to(b)
        undone, info = torch.linalg.solve_ex(m, a, left=False)
        if info.any() or not (m.isfinite().all() and undone.isfinite().all()):
            raise InputError(f"the matrices for {self.value_layer.name} are not finite, or cannot be inverted")
        bias = self.bias(m.dtype)
        self.write(undone, m @ b, None if bias is None else (m @ bias[..., None])[..., 0])


@dataclass(frozen=True)
class Folds:
    """All folds of one block, and why there are no others, one sentence each."""

    inputs: tuple[InputScale, ...] = ()
    hidden: tuple[HiddenScale, ...] = ()
    pairs: tuple[ValueOutput, ...] = ()
    refused: tuple[str, ...] = ()


def _precise(tensor: Tensor) -> Tensor:
    """A detached copy in float64, or in float32 on devices that have no float64."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64, copy=True)


def _bias(module: nn.Module) -> nn.Parameter | None:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, nn.Parameter) else None


def _factors(factors: Tensor, like: Tensor, name: str) -> Tensor:
    """Factors as a vector of the same length, dtype and device as `like`."""
    if factors.shape != like.shape:
        raise InputError(f"{name} takes {len(like)} factors, but these are of shape {tuple(factors.shape)}")
    factors = factors.detach().to(like)
    if not (factors.isfinite() & (factors > 0)).all():
        raise InputError(f"the factors for {name} are not all positive and finite")
    return factors
