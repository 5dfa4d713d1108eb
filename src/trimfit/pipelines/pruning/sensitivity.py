"""What an error in a layer's output costs the model's predictions, found by making one. No gradients are needed."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trimfit.errors import InputError
from trimfit.models import Block, Layer, Walker
from trimfit.models.hooks import after
from trimfit.timing import stage

TOKENS = 1024  # about as many are looked at for one number for each layer
NOISE = 0.1  # of the root mean square of a layer's outputs: of the order of the errors that pruning makes


def looked_at(windows: Tensor) -> Tensor:
    """The first few of (N, L) windows, about `TOKENS` tokens."""
    return windows[: max(1, TOKENS // windows.shape[1])]


@dataclass
class Probe:
    """Adds noise to the outputs of one layer after the other, while a walker goes through the dense model.

    Experts side by side get theirs at once: one alone, of many, may not be heard, or not be called on these windows.

    - `walker`: goes `to_the_end`, over a set of windows called `windows`, best those `looked_at`.
    """

    walker: Walker
    windows: str
    _noise: dict[str, float] = field(init=False, default_factory=dict[str, float])
    _streams: dict[str, str] = field(init=False, default_factory=dict[str, str])

    def disturb(self, block: Block) -> None:
        """Begins a stream for each layer of the block at which the walker stands."""
        side_by_side: dict[str, list[Layer]] = {}
        for layer in block.layers:
            side_by_side.setdefault(layer.parameter, []).append(layer)
        for layers in side_by_side.values():
            noise, name = _Noise(), layers[0].name
            with after([(layer.module, noise) for layer in layers]):
                self.walker.branch(block, self.windows, name)
            self._noise[name] = noise.squares
            self._streams |= dict.fromkeys((layer.name for layer in layers), name)

    def sensitivities(self) -> dict[str, float]:
        """By layer name, nats for each unit of squared error in the layer's outputs, whatever the token.

        The divergence of the predictions from those without noise, divided by the squared norm of the noise. Call it
        when the walk is over. Raises `InputError` when predictions are not finite.
        """
        divergences = dict.fromkeys(self._noise, 0.0)
        with stage("allocation"):
            for span in self.walker.spans(self.windows):
                plain = self._log_probabilities(self.windows, *span)
                for name in divergences:
                    noisy = self._log_probabilities(name, *span)
                    part = nn.functional.kl_div(noisy, plain, reduction="sum", log_target=True)
                    divergences[name] += part.item()
        found = {name: self._sensitivity(name, divergence) for name, divergence in divergences.items()}
        return {name: found[stream] for name, stream in self._streams.items()}

    def _sensitivity(self, name: str, divergence: float) -> float:
        if not divergence < float("inf"):
            raise InputError(
                f"{name}: noise in its outputs gives predictions that are not finite: the model is damaged"
            )
        return divergence / self._noise[name] if self._noise[name] > 0 else 0.0

    def _log_probabilities(self, name: str, batch: int, positions: Tensor) -> Tensor:
        return self.walker.logits(name, self.windows, batch, positions).float().log_softmax(-1)


class _Noise:
    """A hook that adds white noise, always the same, and sums its squares."""

    def __init__(self) -> None:
        self.squares = 0.0
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
        rows = output.float()
        size = NOISE * rows.square().mean().sqrt()
        noise = torch.randn(rows.shape, generator=self._generator).to(rows.device) * size
        self.squares += noise.square().sum().item()
        return output + noise.to(output.dtype)
