"""Which layers lose weights."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from trimfit.errors import InputError
from trimfit.masks import NM
from trimfit.models import Block, Layer, select_layers
from trimfit.pipelines.pruning.config import PruneConfig


def select_losing(model: PreTrainedModel, blocks: Sequence[Block], config: PruneConfig) -> list[Block]:
    """The blocks, each with only those of its layers that lose weights.

    Raises `InputError` for wrong patterns in `keep_dense`, and for a layer that the N:M pattern does not divide.
    """
    losing = select_layers(model, blocks, config.keep_dense, "keep-dense")
    pattern = config.mask_pattern
    if isinstance(pattern, NM):
        _check_widths([layer for block in losing for layer in block.layers], pattern)
    return losing


def _check_widths(layers: Sequence[Layer], pattern: NM) -> None:
    misfits = [layer for layer in layers if layer.weight.shape[1] % pattern.m]
    if not misfits:
        return
    first, others = misfits[0], f", nor can those of {len(misfits) - 1} more layers" if len(misfits) > 1 else ""
    globs = " ".join(sorted({f"'*{layer.name.rpartition('.')[2]}'" for layer in misfits}))
    raise InputError(
        f"{first.name}: {first.weight.shape[1]} inputs cannot be split into groups of {pattern.m} for the pattern "
        f"{pattern.n}:{pattern.m}{others}; keep them dense (--keep-dense {globs}) or leave them out (--ignore), or "
        "choose another M or an unstructured sparsity"
    )
