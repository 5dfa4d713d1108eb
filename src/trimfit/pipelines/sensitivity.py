"""What an error in a layer's output costs the model's predictions, to second order: one backward pass a window."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.errors import InputError
from trimfit.models import Layer, evaluation_mode

WINDOWS = 16  # enough for one number for each layer


def output_sensitivities(model: PreTrainedModel, layers: Sequence[Layer], windows: Tensor) -> dict[str, float]:
    """Mean squared derivative of the negative log-likelihood by a layer's outputs, nats² per squared output.

    Half of it times the squared error of a layer's output per token estimates the nats per token that the error costs
    (the empirical Fisher matrix, taken as a multiple of the identity).

    - `layers`: of the dense model.
    - `windows`: (N, L) token ids, of which the first `WINDOWS` are used, one at a time. Activations of the whole model
      are held for the backward pass; no gradients of weights are.

    Raises `InputError` when the derivatives are not finite.
    """
    sums = {layer.name: 0.0 for layer in layers}
    counts = dict.fromkeys(sums, 0)

    def watch(name: str) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            sums[name] += gradient.float().square().sum(dtype=torch.float64).item()
            counts[name] += gradient.numel()

        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(add)

        return hook

    def start(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.detach().requires_grad_()  # what the graph begins with: all parameters are frozen

    with _frozen(model), evaluation_mode(model), torch.enable_grad(), ExitStack() as stack:
        stack.callback(model.get_input_embeddings().register_forward_hook(start).remove)
        for layer in layers:
            stack.callback(layer.module.register_forward_hook(watch(layer.name)).remove)
        for window in windows[:WINDOWS].to(model.device, torch.int64):
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
            nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum").backward()
    means = {name: sums[name] / max(1, counts[name]) for name in sums}
    for name, mean in means.items():
        if not mean < float("inf"):
            raise InputError(f"{name}: derivatives of the model's loss are not finite; use another allocation")
    return means


@contextmanager
def _frozen(model: nn.Module) -> Generator[None]:
    """No parameter requires a gradient while the context lasts."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
