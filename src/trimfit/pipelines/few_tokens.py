"""What is done about experts that calibration tokens are hardly ever routed to."""

from dataclasses import replace

import torch

from trimfit.calibration import InputMoments
from trimfit.models import Group

ENOUGH = 8  # tokens for each input of an expert; measured: docs/method.md, section 14


def raised_damping(damping: float, group: Group, tokens: int) -> float:
    """λ for `tokens` tokens: the one asked for where they are enough, else more, in proportion to what is missing."""
    width = group.layers[0].weight.shape[1]
    return damping * max(1.0, ENOUGH * width / max(1, tokens)) if group.is_expert else damping


def has_few(group: Group, tokens: int) -> bool:
    """Whether this is an expert whose Gram matrix is of too few tokens."""
    return raised_damping(1.0, group, tokens) > 1


def of_no_tokens(group: Group, moments: InputMoments) -> InputMoments:
    """Moments for an expert that no token was routed to: as far as anyone knows all its inputs count the same."""
    width = group.layers[0].weight.shape[1]
    return replace(moments, gram=torch.eye(width, device=moments.gram.device), drift=None)
