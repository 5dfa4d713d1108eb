"""What the inputs of each layer look like on average, as the weights alone tell it: Gram matrices without any data.

Whoever starts tells the second moment of what enters the first block. From there second moments follow from weights:
a norm scales them, values and output projection map them, the MLP maps samples of a Gaussian with that moment, and what
each part writes is added to the residual stream. Nothing is known of the text, but which directions the earlier layers
write to, and which of them later layers read together, is, and that is much of what a Gram matrix of data holds.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLES = 4096  # of the Gaussian that goes through an MLP

# Attention averages the values of several tokens, each head those of others. Neither number matters much: between 0.2
# and 1 the error after quantization changes by about as much as by another seed.
_KEPT_BY_AVERAGE = 0.5
_SHARED_BY_HEADS = 0.5


@dataclass(frozen=True)
class Norm:
    """A norm before or after a part of a block.

    - `weight`: (n,) what it multiplies by.
    - `bias`: (n,) what it adds, or None.
    - `centred`: whether it subtracts the mean over the channels (LayerNorm) or does not (RMSNorm).
    """

    weight: Tensor
    bias: Tensor | None = None
    centred: bool = False

    def moment(self, moment: Tensor) -> Tensor:
        """E[y yᵀ] (n, n) of what the norm gives for inputs with that E[x xᵀ] (n, n)."""
        if self.centred:
            moment = moment - moment.mean(0, keepdim=True)
            moment = moment - moment.mean(1, keepdim=True)
        moment = moment / moment.diagonal().mean().clamp(min=torch.finfo(moment.dtype).tiny)
        weight = self.weight.to(moment)
        moment = moment * weight[:, None] * weight
        if self.bias is not None:
            bias = self.bias.to(moment)
            moment = moment + torch.outer(bias, bias)
        return moment


class ResidualStream:
    """E[x xᵀ] (n, n) of the hidden states, from block to block, in float32.

    - `size`: n.
    - `mean_square`: of the hidden states that enter the first block.
    """

    def __init__(self, size: int, mean_square: float, device: torch.device):
        self.moment = torch.eye(size, device=device) * mean_square

    def add(self, weight: Tensor, moment: Tensor, norm: Norm | None = None, scale: float = 1.0) -> None:
        """Adds what a layer W (n, in) writes for inputs with that moment (in, in), through a norm if there is one.

        It is multiplied by `scale` before it is added.
        """
        written = weight.to(moment) @ moment @ weight.to(moment).T
        written = written if norm is None else norm.moment(written)
        self.moment = self.moment + scale**2 * written


def attention_moment(inputs: Tensor, values: Tensor, bias: Tensor | None, columns: Tensor) -> Tensor:
    """E[y yᵀ] (h·r, h·r) of what the heads give to the output projection.

    **Arguments**

    - `inputs`: E[x xᵀ] (n, n) of the inputs of V.
    - `values`, `bias`: (kv_heads, r, n) rows of V, (kv_heads, r) or None.
    - `columns`: (kv_heads, g, r) int64, where the output projection takes each query head of each KV head.
    """
    heads, group, size = columns.shape
    flat = values.to(inputs).flatten(0, 1)
    moment = flat @ inputs @ flat.T
    place = torch.arange(heads * size, device=inputs.device).view(heads, 1, size).expand(heads, group, size).flatten()
    query = torch.arange(heads * group, device=inputs.device).repeat_interleave(size)
    share = torch.where(query[:, None] == query, 1.0, _SHARED_BY_HEADS)
    order = columns.flatten().to(inputs.device).argsort()
    place, share = place[order], share[order][:, order]
    moment = moment[place][:, place] * share * _KEPT_BY_AVERAGE
    if bias is not None:  # an average of values with a bias has all of it, the same for every query head
        constant = bias.to(inputs).flatten()[place]
        moment = moment + torch.outer(constant, constant)
    return moment


def mlp_moment(
    inputs: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    *,
    seed: int = 0,
) -> Tensor:
    """E[h hᵀ] (ffn, ffn) of h = activation(gate x) ⊙ up x, or activation(up x) without a gate, for Gaussian x.

    - `inputs`: E[x xᵀ] (n, n).
    - `up`, `gate`: (ffn, n), with biases (ffn,) or None.
    """
    factor = _square_root(inputs)
    noise = torch.randn(SAMPLES, len(inputs), generator=torch.Generator().manual_seed(seed)).to(inputs)
    x = noise @ factor
    hidden = torch.nn.functional.linear(x, up.to(x), None if up_bias is None else up_bias.to(x))
    if gate is None:
        hidden = activation(hidden)
    else:
        hidden *= activation(torch.nn.functional.linear(x, gate.to(x), None if gate_bias is None else gate_bias.to(x)))
    return hidden.T @ hidden / SAMPLES


def _square_root(moment: Tensor) -> Tensor:
    """F with FᵀF = moment, also for a moment that is singular."""
    factor, info = torch.linalg.cholesky_ex(moment)
    if info.item() == 0:
        return factor.T
    values, vectors = torch.linalg.eigh(moment)
    return values.clamp(min=0).sqrt()[:, None] * vectors.T
