"""Finds blocks, layers and groups in a Hugging Face model, and walks it block by block."""

from trimfit.models.calls import Chain as Chain
from trimfit.models.causality import check_causal as check_causal
from trimfit.models.find_folds import find_folds as find_folds
from trimfit.models.flow import Flow as Flow
from trimfit.models.flow import find_flow as find_flow
from trimfit.models.flow import rows_of as rows_of
from trimfit.models.folds import Folds as Folds
from trimfit.models.folds import HiddenScale as HiddenScale
from trimfit.models.folds import InputScale as InputScale
from trimfit.models.folds import ValueOutput as ValueOutput
from trimfit.models.free_order import FreeOrder as FreeOrder
from trimfit.models.free_order import find_free_orders as find_free_orders
from trimfit.models.groups import Group as Group
from trimfit.models.groups import at_once as at_once
from trimfit.models.groups import together as together
from trimfit.models.heads import QueryKey as QueryKey
from trimfit.models.heads import find_query_key as find_query_key
from trimfit.models.placement import IN_MEMORY as IN_MEMORY
from trimfit.models.placement import Placement as Placement
from trimfit.models.structure import Block as Block
from trimfit.models.structure import Layer as Layer
from trimfit.models.structure import find_blocks as find_blocks
from trimfit.models.structure import hidden_size as hidden_size
from trimfit.models.structure import select_layers as select_layers
from trimfit.models.walk import Walker as Walker
