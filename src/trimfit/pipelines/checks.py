"""What every pipeline checks before anything changes."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.calibration import check_ids, context_length
from trimfit.checkpoints.stream import Stream
from trimfit.checkpoints.tensor_bytes import fingerprint_of
from trimfit.errors import InputError
from trimfit.models import Layer


def check_tokens(model: PreTrainedModel, tokens: Tensor) -> None:
    """Raises `InputError` for calibration windows (N, L) that the model cannot be run on."""
    if tokens.dim() != 2 or tokens.numel() == 0:
        raise InputError(f"tokens must be (windows, length) and not empty, but their shape is {tuple(tokens.shape)}")
    if tokens.is_floating_point() or tokens.dtype == torch.bool:
        raise InputError(f"token ids must be integers, but they are {tokens.dtype}")
    check_ids(tokens, model.get_input_embeddings().get_parameter("weight").shape[0])
    longest = context_length(model.config)
    if longest is not None and tokens.shape[1] > longest:
        raise InputError(f"the windows have {tokens.shape[1]} tokens, but the model's context is {longest}; cut them")


def check_finite(model: PreTrainedModel) -> None:
    """Raises `InputError` for weights that are NaN or infinite."""
    for name, parameter in model.named_parameters():
        check_finite_weight(name, parameter)


def check_finite_weight(name: str, weight: Tensor) -> None:
    """The same for one of them."""
    if not torch.isfinite(weight).all():
        raise InputError(f"{name} has NaN or infinite entries: the checkpoint is damaged; nothing was changed")


def check_stream(stream: Stream) -> str:
    """The `fingerprint` of the model. Raises `InputError` for weights that are NaN or infinite."""
    parameters = {name for name, _ in stream.checkpoint.model.named_parameters()}

    def checked() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in stream.tensors():
            if name in parameters:
                check_finite_weight(name, tensor)
            yield name, tensor

    return fingerprint_of(checked())


@contextmanager
def naming(layer: Layer) -> Generator[None]:
    """Puts the layer's name in front of errors of the tensor rooms, which know no models."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{layer.name}: {error}") from error
