"""Finds blocks, layers and groups in a Hugging Face model, and walks it block by block."""

from trimfit.models.causality import check_causal as check_causal
from trimfit.models.mode import evaluation_mode as evaluation_mode
from trimfit.models.structure import Block as Block
from trimfit.models.structure import Layer as Layer
from trimfit.models.structure import find_blocks as find_blocks
from trimfit.models.structure import select_layers as select_layers
from trimfit.models.walk import Group as Group
from trimfit.models.walk import Walker as Walker
