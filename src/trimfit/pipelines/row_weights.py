"""How much the outputs of a row count when the rows of a layer compete for the weights that stay."""

import torch
from torch import Tensor

from trimfit.models import QueryKey


def attention_row_weights(pair: QueryKey, gram: Tensor) -> dict[str, Tensor]:
    """By layer name, (out,) float32 weights of the rows of Q and K: root mean squares of what they are multiplied by.

    An attention logit is Σ_i q_i k_i. An error in q_i is multiplied by k_i, so the rows of Q count as much as the same
    rows of K are large, and the other way round; a row of K meets those of all query heads that share it. Positions
    that are rotated are taken as they are before that.

    `gram` is H (in, in) of the input that both layers share.
    """
    query, key = (_mean_squares(layer.weight.float(), gram.float()) for layer in (pair.query, pair.key))
    by_head = key.view(pair.key_heads, 1, -1)
    shared = query.view(pair.key_heads, -1, by_head.shape[2])
    return {
        pair.query.name: by_head.expand_as(shared).flatten().sqrt(),
        pair.key.name: shared.sum(1).flatten().sqrt(),
    }


def _mean_squares(weight: Tensor, gram: Tensor) -> Tensor:
    """(out,) of the rows' outputs."""
    return ((weight @ gram) * weight).sum(1).clamp_min(0)


def usable(row_weights: Tensor) -> Tensor:
    """(out, 1) relative to their mean, none so small that a row vanishes; all 1 where there is nothing to tell."""
    mean = row_weights.mean()
    if not mean > 0:
        return torch.ones_like(row_weights)[:, None]
    return (row_weights / mean).clamp_min(1e-4)[:, None]
