"""Modes of a model and of torch, for a while."""

from collections.abc import Generator
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

from trimfit.errors import InputError
from trimfit.precision import half_products


@contextmanager
def evaluation_mode(model: nn.Module) -> Generator[None]:
    """Every module in eval mode, afterwards in the mode it had."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode  # not train(): that would set all modules inside as well


@contextmanager
def forward_mode(model: nn.Module) -> Generator[None]:
    """Eval mode, and products as quick as the device has them: for forward passes, as each call within costs more."""
    # On "meta" are weights that wait in their files; the mode costs little where they are then computed elsewhere.
    on_cpu = all(parameter.device.type in ("cpu", "meta") for parameter in model.parameters())
    with evaluation_mode(model), half_products(torch.device("cpu")) if on_cpu else nullcontext():
        yield


@contextmanager
def autograd_possible(model: nn.Module, needed: bool) -> Generator[None]:
    """Outside `torch.inference_mode()`, whose tensors autograd cannot follow, where the model was made outside of it.

    Raises `InputError` where it was not and autograd is `needed`.
    """
    if not any(parameter.is_inference() for parameter in model.parameters()):
        with torch.inference_mode(False):
            yield
        return
    if needed:
        raise InputError(
            f"the weights of {type(model).__name__} were made under torch.inference_mode(), where the curvature of "
            "attention cannot be found: make or load the model outside of it, or ask for row_weights 'equal'"
        )
    yield
