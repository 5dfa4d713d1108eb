"""Tells a decoder from an encoder by what it does, since configs do not always say."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.errors import InputError
from trimfit.mode import forward_mode
from trimfit.models.calls import logits_at

_LOOKED_AT = 64  # tokens; logits of all of them would take much memory


@torch.no_grad()
def check_causal(model: PreTrainedModel, window: Tensor) -> None:
    """Raises `InputError` when another second half of a text changes what the model predicts in the first.

    `window` is (L,) token ids; windows of one token tell nothing.
    """
    if len(window) < 2:
        return
    half = len(window) // 2
    other = window.clone()
    other[half:] = (window[half:] + 1) % int(window.max() + 1)  # other tokens, and all in the vocabulary
    near = torch.arange(max(0, half - _LOOKED_AT), half)  # whoever sees far to the right sees what is near
    with forward_mode(model):
        logits = logits_at(model, torch.stack([window, other]).to(model.device), near)
    rounding = 4 * torch.finfo(logits.dtype).eps
    if (logits[0] - logits[1]).abs().max() > rounding * logits.abs().max():
        raise InputError(
            f"{type(model).__name__} looks at tokens to the right, so it is an encoder; trimfit works on decoder-only "
            "language models"
        )
