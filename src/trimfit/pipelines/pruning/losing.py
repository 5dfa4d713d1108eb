"""Which layers lose weights."""

from collections.abc import Sequence

from transformers import PreTrainedModel

from trimfit.masks import check_width
from trimfit.models import Block, select_layers
from trimfit.pipelines.checks import naming
from trimfit.pipelines.pruning.config import PruneConfig


def select_losing(model: PreTrainedModel, blocks: Sequence[Block], config: PruneConfig) -> list[Block]:
    """The blocks, each with only those of its layers that lose weights.

    Raises `InputError` for wrong patterns in `keep_dense`, and for a layer that the N:M pattern does not divide.
    """
    losing = select_layers(model, blocks, config.keep_dense, "keep-dense")
    for layer in (layer for block in losing for layer in block.layers):
        with naming(layer):
            check_width(config.mask_pattern, layer.weight.shape[1])
    return losing
