"""Tells a decoder from an encoder by what it does, since configs do not always say."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.errors import InputError
from trimfit.models.mode import evaluation_mode


@torch.no_grad()
def check_causal(model: PreTrainedModel, window: Tensor) -> None:
    """Raises `InputError` when another last token changes what the model predicts before it.

    `window` is (L,) token ids; windows of one token tell nothing.
    """
    if len(window) < 2:
        return
    other = window.clone()
    other[-1] = window[0] if window[0] != window[-1] else (window[-1] + 1) % model.config.get_text_config().vocab_size
    with evaluation_mode(model):
        pair = torch.stack([window, other]).to(model.device)
        logits: Tensor = model(input_ids=pair, use_cache=False).logits[:, :-1].float()
    difference = (logits[0] - logits[1]).abs().max()
    if difference > 1e-2 * logits.abs().max():
        raise InputError(
            f"{type(model).__name__} looks at tokens to the right, so it is an encoder; trimfit works on decoder-only "
            "language models"
        )
