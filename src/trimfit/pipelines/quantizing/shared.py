"""What the processes of a run share: the rows of a rounding, and what the first of them has found."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trimfit.models import Block
from trimfit.quant import Grid, Quantized
from trimfit.quant.blocks import BlockTransform
from trimfit.ranks import Ranks


def shared_rounding(
    round_rows: Callable[[slice], Quantized], weight: Tensor, grid: Grid, dtype: torch.dtype, ranks: Ranks
) -> Quantized:
    """What `round_rows` makes of rows of a weight (out, in), with scales of that dtype: each process of as many.

    `grid` is fitted to `in`. Each row is rounded on its own, so this is what one process makes of all of them, but for
    the order in which a product of other shape sums.
    """
    if ranks.count == 1:
        return round_rows(slice(0, len(weight)))
    rows, width = weight.shape
    size = -(-rows // ranks.count)
    chunks = [slice(first, min(first + size, rows)) for first in range(0, rows, size)]
    own, counts = [round_rows(chunk) for chunk in ranks.share(chunks)], [chunk.stop - chunk.start for chunk in chunks]
    codes = torch.empty(0, width, dtype=torch.uint8, device=weight.device)
    groups = codes[:, : width // (grid.group_size or width)]
    return Quantized(
        ranks.gather([part.codes for part in own], counts, codes),
        ranks.gather([part.scale for part in own], counts, groups.to(dtype)),
        ranks.gather([part.zero_point for part in own], counts, groups),
        grid,
    )


def shared_transform(find: Callable[[], BlockTransform | None], like: Tensor, ranks: Ranks) -> BlockTransform | None:
    """The transformation that the first process finds, on the device of `like`."""
    found = ranks.first_only(find)
    if ranks.count == 1:
        return found
    told = ranks.first(lambda: (found.name, found.inverses.shape) if found else None)
    if told is None:
        return None
    name, shape = told
    matrices, inverses = (found.matrices, found.inverses) if found else (like.new_empty(shape), like.new_empty(shape))
    return BlockTransform(ranks.same(matrices), ranks.same(inverses), name)


def share_state(ranks: Ranks, block: Block, tensors: Iterable[Tensor] = ()) -> None:
    """Gives a block of the model, and other tensors, the values that they have in the first process."""
    if ranks.count > 1:
        for tensor in (*block.module.state_dict().values(), *tensors):
            tensor.copy_(ranks.same(tensor.clone()))
