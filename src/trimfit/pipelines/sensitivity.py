"""What an error in a layer's output costs the model's predictions, found by making one. No gradients are needed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.errors import InputError
from trimfit.models import Layer, evaluation_mode

TOKENS = 1024  # about as many are looked at for one number for each layer
NOISE = 0.1  # of the root mean square of a layer's outputs: of the order of the errors that pruning makes


@torch.no_grad()
def output_sensitivities(model: PreTrainedModel, layers: Sequence[Layer], windows: Tensor) -> dict[str, float]:
    """By layer name, nats per token for each unit of squared error per token in the layer's outputs.

    White noise is added to the outputs of one layer at a time, and the divergence of the predictions from those without
    noise is divided by the squared norm of the noise.

    - `layers`: of the dense model.
    - `windows`: (N, L) token ids, of which the first few are used, about `TOKENS` tokens.

    Raises `InputError` when predictions are not finite.
    """
    used = windows[: max(1, TOKENS // windows.shape[1])].to(model.device, torch.int64)
    with evaluation_mode(model):
        plain = _log_probabilities(model, used)
        found = {layer.name: _sensitivity(model, layer, used, plain) for layer in layers}
    for name, value in found.items():
        if not value < float("inf"):
            raise InputError(
                f"{name}: noise in its outputs gives predictions that are not finite: the model is damaged"
            )
    return found


def _sensitivity(model: PreTrainedModel, layer: Layer, windows: Tensor, plain: list[Tensor]) -> float:
    generator = torch.Generator().manual_seed(0)
    squares = 0.0

    def disturb(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        nonlocal squares
        rows = output.float()
        noise = torch.randn(rows.shape, generator=generator).to(rows.device) * (NOISE * rows.square().mean().sqrt())
        squares += noise.square().sum().item()
        return output + noise.to(output.dtype)

    handle = layer.module.register_forward_hook(disturb)
    try:
        disturbed = _log_probabilities(model, windows)
    finally:
        handle.remove()
    divergence = sum(
        nn.functional.kl_div(there, here, reduction="sum", log_target=True).item()
        for here, there in zip(plain, disturbed, strict=True)
    )
    return divergence / squares if squares > 0 else 0.0


def _log_probabilities(model: PreTrainedModel, windows: Tensor) -> list[Tensor]:
    """(L, V) of each window."""
    return [model(input_ids=window[None], use_cache=False).logits[0].float().log_softmax(-1) for window in windows]
