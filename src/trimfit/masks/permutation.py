"""The order of a layer's inputs, where it is free: so that each group of N:M has inputs of which few are missed.

N:M keeps the n best of each m consecutive weights of a row, so it loses most where a group holds more than n weights
that matter. Which inputs stand together is decided once for all rows (channel permutation, Pool & Yu 2021): from a
start that deals the inputs out by what they matter, two groups exchange an input each as long as more is kept for it.
"""

import torch
from torch import Tensor

from trimfit.masks.borders import kth_lowest_of_columns
from trimfit.masks.patterns import NM, check_width
from trimfit.refit.gram import FactoredGram

_ROWS = 1024  # that have a say: with more of them the order becomes little better, and takes longer
_CHUNK_ELEMENTS = 2**22  # of the gains of a chunk of rows
_CHUNK_ELEMENTS_CPU = 2**18  # about what its caches hold
_SMALLEST_GAIN = 1e-5  # of all that is kept: below it the exchanges have come to an end


def obs_scores(weight: Tensor, gram: FactoredGram) -> Tensor:
    """(out, in) float32: w_j² / (H⁻¹)_jj, twice what a row loses without weight j when all others make up for it."""
    inverse = (gram.inverse.diagonal() * gram.scale.square()).float()
    return torch.where(gram.dead, 0, weight.float().square() / inverse)


def spread(scores: Tensor, pattern: NM) -> Tensor:
    """(n,) int64 permutation of the inputs: `scores[:, permutation]` keeps much under the pattern, no less than before.

    `scores` is (rows, n), what each weight matters, not negative. Deterministic; inputs stay where they are when
    nothing better is found. Raises `InputError` for an n that does not suit the pattern.
    """
    n = scores.shape[1]
    check_width(pattern, n)
    scores = scores[:: -(-len(scores) // _ROWS)].float()
    given = torch.arange(n, device=scores.device).view(-1, pattern.m)
    order = max(given, _dealt(scores, pattern.m), key=lambda order: _kept(scores, order, pattern.n))
    by_input = scores.T.contiguous()
    step = unchanged = 0
    while unchanged < 2 * pattern.m:
        # Each group offers one input. Which one is shifted from round to round, so that all pairs come to meet.
        position, shift = step % pattern.m, step // pattern.m
        offered = (position + shift * torch.arange(len(order), device=order.device)) % pattern.m
        better = _exchange(by_input, order, offered, pattern.n)
        unchanged = unchanged + 1 if better is None else 0
        order = order if better is None else better
        step += 1
    return order.flatten()


def _dealt(scores: Tensor, m: int) -> Tensor:
    """(groups, m) inputs, dealt out from the most to the least important, there and back."""
    order = scores.sum(0).argsort(descending=True, stable=True).view(m, -1)
    order[1::2] = order[1::2].flip(1)
    return order.T.contiguous()


def _kept(scores: Tensor, order: Tensor, n: int) -> float:
    return scores[:, order].topk(n, dim=2).values.sum().item()


def _exchange(by_input: Tensor, order: Tensor, position: Tensor, n: int) -> Tensor | None:
    """The groups (groups, m) after exchanges of the inputs at `position` (groups,), or None when too little is gained.

    Two groups exchange when each is what the other gains most with. `by_input` (inputs, rows) are the scores.
    """
    groups = torch.arange(len(order), device=order.device)
    inputs = order[groups, position]
    others = order[order != inputs[:, None]].view(len(order), -1)
    offered = by_input[inputs].T.contiguous()
    # An input adds to its group what it is above the n-th best of the others there.
    threshold = kth_lowest_of_columns([by_input[other] for other in others.T], others.shape[1] - n + 1).T.contiguous()
    added = by_input.new_zeros(len(order), len(order))
    elements = _CHUNK_ELEMENTS_CPU if order.device.type == "cpu" else _CHUNK_ELEMENTS
    for part in torch.arange(len(offered), device=order.device).split(max(1, elements // len(order) ** 2)):
        added += (offered[part, None, :] - threshold[part, :, None]).clamp_(min=0).sum(0)
    now = added.diagonal()
    gain = added + added.T - now[:, None] - now
    best, partner = gain.max(1)
    exchanged = (best > 0) & (partner[partner] == groups)
    if not best[exchanged].sum() > 2 * _SMALLEST_GAIN * by_input.sum():
        return None
    order = order.clone()
    order[groups[exchanged], position[exchanged]] = inputs[partner[exchanged]]
    return order
