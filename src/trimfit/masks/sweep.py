"""What selectors need that go over the columns from left to right and let the columns to the right make up for it."""

from collections.abc import Iterator

from trimfit.errors import InputError
from trimfit.masks.patterns import NM, Pattern

BLOCK = 128  # columns, as in SparseGPT


def column_blocks(width: int, block: int, pattern: Pattern) -> Iterator[tuple[int, int]]:
    """(start, stop) of the blocks of a sweep. For N:M they are a multiple of M wide: no group straddles a border."""
    if block < 1:
        raise InputError(f"a block must have at least one column, but the block size is {block}")
    if isinstance(pattern, NM):
        block = pattern.m * max(1, block // pattern.m)
    for start in range(0, width, block):
        yield start, min(start + block, width)
