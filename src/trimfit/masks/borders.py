"""The value at a border in the order of many numbers, and masks found by it: no sort, which takes far longer."""

from collections.abc import Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from trimfit.masks.patterns import check_numbers, prune_lowest

_FEW = 16  # entries in a run, up to which passes over all runs at once are faster than a selection in each


class Borders:
    """Prunes as `prune_lowest` does, again and again by the same counts, which differ by one at most.

    - `counts`: how many to prune in each run; `device`: of the scores.
    """

    def __init__(self, counts: Tensor, device: torch.device):
        self._runs, self._lowest, self._highest = len(counts), int(counts.min()), int(counts.max())
        # There can be millions of runs: numbers for all of them, and on the device, only where they differ.
        self._counts: Tensor | int = self._lowest if self._lowest == self._highest else counts.to(device)

    def prune_lowest(self, scores: Tensor) -> Tensor:
        """The mask (m, n) of scores (m, n) that are not negative."""
        runs = scores.reshape(self._runs, -1)
        if self._lowest == 0:
            return prune_lowest(scores, torch.as_tensor(self._counts).expand(self._runs))
        border = kth_lowest(runs, self._lowest)
        if isinstance(self._counts, Tensor):
            border = torch.where(self._counts == self._highest, kth_lowest(runs, self._highest), border)
        mask = runs > border[:, None]
        room = runs.shape[1] - self._counts - mask.sum(1)
        if room.any():  # scores are tied at the border: the first of them stay
            check_numbers(scores)
            tied = runs == border[:, None]
            mask |= tied & (tied.cumsum(1) <= room[:, None])
        return mask.view(scores.shape)


def kth_lowest(runs: Tensor, k: int) -> Tensor:
    """The k-th lowest value of each row of (m, n), k from 1."""
    if runs.shape[1] <= _FEW:
        return kth_lowest_of_columns(runs.T.contiguous().unbind(), k)
    if runs.device.type == "cpu":  # kthvalue takes ten times as long
        return torch.from_numpy(np.partition(runs.numpy(), k - 1, axis=1)[:, k - 1].copy())
    return runs.sort(dim=1).values[:, k - 1]  # there kthvalue goes through each row, here a layer, with one block


def kth_lowest_of_columns(columns: Sequence[Tensor], k: int) -> Tensor:
    """The k-th lowest entry, k from 1, among a few tensors of one shape, place by place.

    Both halves are sorted; of the k lowest, i are the lowest of one half and k − i of the other.
    """
    left, right = _sorted(columns[: len(columns) // 2]), _sorted(columns[len(columns) // 2 :])
    ends = [
        right[k - 1] if i == 0 else left[k - 1] if i == k else torch.maximum(left[i - 1], right[k - i - 1])
        for i in range(max(0, k - len(right)), min(k, len(left)) + 1)
    ]
    return reduce(torch.minimum, ends)


def _sorted(columns: Sequence[Tensor]) -> list[Tensor]:
    columns = list(columns)
    for last in range(len(columns) - 1, 0, -1):
        for i in range(last):
            low, high = columns[i : i + 2]
            columns[i], columns[i + 1] = torch.minimum(low, high), torch.maximum(low, high)
    return columns


def sort(values: Tensor) -> Tensor:
    """Values (n,) in rising order."""
    if values.device.type == "cpu":  # torch finds the indices too, and takes twenty times as long
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values
