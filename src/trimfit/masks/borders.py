"""The value at a border in the order of many numbers, and masks found by it: no sort, which takes far longer."""

import numpy as np
import torch
from torch import Tensor

from trimfit.masks.patterns import check_numbers, prune_lowest

_FEW = 16  # entries in a run, up to which passes over all runs at once are faster than a selection in each


def prune_lowest_unsorted(scores: Tensor, counts: Tensor) -> Tensor:
    """As `prune_lowest`, for counts that differ by one at most. `scores` are (m, n), not negative."""
    runs = scores.reshape(len(counts), -1)
    lowest, highest = int(counts.min()), int(counts.max())
    if lowest == 0:
        return prune_lowest(scores, counts)
    counts = counts.to(scores.device)
    border = kth_lowest(runs, lowest)
    if highest > lowest:
        border = torch.where(counts == highest, kth_lowest(runs, highest), border)
    mask = runs > border[:, None]
    room = runs.shape[1] - counts - mask.sum(1)
    if room.any():  # scores are tied at the border: the first of them stay
        check_numbers(scores)
        tied = runs == border[:, None]
        mask |= tied & (tied.cumsum(1) <= room[:, None])
    return mask.view(scores.shape)


def kth_lowest(runs: Tensor, k: int) -> Tensor:
    """The k-th lowest value of each row of (m, n), k from 1."""
    if runs.shape[1] <= _FEW:
        return _kth_lowest_of_few(runs, k)
    if runs.device.type == "cpu":  # kthvalue takes ten times as long
        return torch.from_numpy(np.partition(runs.numpy(), k - 1, axis=1)[:, k - 1].copy())
    return runs.sort(dim=1).values[:, k - 1]  # there kthvalue goes through each row, here a layer, with one block


def _kth_lowest_of_few(runs: Tensor, k: int) -> Tensor:
    """Takes the lowest entry of every run out, k times."""
    columns = list(runs.T.contiguous())
    lowest = columns[0]
    for _ in range(k):
        lowest, *others = columns
        columns: list[Tensor] = []
        for other in others:
            columns.append(torch.maximum(lowest, other))
            lowest = torch.minimum(lowest, other)
    return lowest


def sort(values: Tensor) -> Tensor:
    """Values (n,) in rising order."""
    if values.device.type == "cpu":  # torch finds the indices too, and takes twenty times as long
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values
