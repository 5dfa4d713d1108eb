"""Fisher information of attention weights, summed over calibration tokens as they stream past."""

import torch
from torch import Tensor

from trimfit.ranks import Ranks

CURVATURE_TOKENS = 2**12  # each a draw for the curvature of a head's logits, which has some hundred squared entries


class FisherSum:
    """Sums g gᵀ of the slopes g (d,) in the outputs of each head: slopes in float32, their sum in float64.

    On a device without float64 it is float32.

    - `heads`, `size`: how many heads there are, and d, the outputs of each.
    """

    def __init__(self, heads: int, size: int, device: torch.device):
        wide = torch.float32 if device.type == "mps" else torch.float64
        self._sum = torch.zeros(heads, size, size, dtype=wide, device=device)

    def add(self, slopes: Tensor, weight: float) -> None:
        """Adds the tokens of `slopes` (..., heads · d), each as many times as `weight` says."""
        by_head = slopes.reshape(-1, *self._sum.shape[:2]).transpose(0, 1)
        self._sum += weight * by_head.mT @ by_head

    def value(self, tokens: int, ranks: Ranks) -> Tensor:
        """(heads, d, d) of what all of `ranks` have added, for each of the tokens that they have seen."""
        total = self._sum.clone()
        ranks.sum(total)
        return total / tokens


def slope_of_a_draw(logits: Tensor, seed: int) -> Tensor:
    """∂ log p_j / ∂ logits (B, heads, queries, L), p their softmax, with one key j for each query, drawn from p.

    The same `seed`, the same draws.
    """
    p = logits.softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    point = torch.rand(p.shape[:-1], generator=generator).to(p.device)[..., None]
    reached = p.cumsum(-1)
    drawn = torch.searchsorted(reached, point * reached[..., -1:])  # where p is 0 the sum does not grow
    return p.neg_().scatter_add_(-1, drawn.clamp_(max=p.shape[-1] - 1), torch.ones_like(point))
