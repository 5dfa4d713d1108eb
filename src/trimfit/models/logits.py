"""What errors in the outputs of Q and K do to attention: the curvature of its logits, whatever stands between."""

from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimfit.models.heads import QueryKey
from trimfit.models.hooks import Stop, after
from trimfit.models.structure import Layer
from trimfit.ranks import Ranks

_NAME = "trimfit_logits"
_MOST_LOGITS = 2**27  # seen at once: of long windows only every second query, or every third, …


class LogitCurvature:
    """Sums the Fisher information of the attention weights in the outputs of Q and of K, head by head.

    With p the attention weights of a query, errors δ in its logits cost KL(p ‖ p') ≈ ½ Var_p(δ). For an output y of Q
    or K that is ½ δyᵀ E[g gᵀ] δy with g = ∂ log p_j / ∂y and a key j drawn from p: one draw for each query and head,
    and one backward pass from the logits to the two layers, through rotations and norms as the model has them. Draws
    are independent and have mean 0, so other tokens and heads do not mix in. No weight is touched, nothing is learned.

    - `pair`: of one block.
    """

    def __init__(self, model: PreTrainedModel, pair: QueryKey):
        attention = model.get_submodule(pair.query.name.rpartition(".")[0])
        self._config: Any = getattr(attention, "config", None)
        self._heads = {pair.query: pair.query_heads, pair.key: pair.key_heads}
        wide = torch.float32 if model.device.type == "mps" else torch.float64
        self._sums = {
            layer: torch.zeros(heads, *2 * (len(layer.weight) // heads,), dtype=wide, device=model.device)
            for layer, heads in self._heads.items()
        }
        self._tokens = 0

    def add(self, run: Callable[[], object], seed: int) -> None:
        """Adds what is seen while `run` takes hidden states through the block. The same `seed`, the same draws."""
        outputs: dict[Layer, Tensor] = {}

        def leaf(layer: Layer) -> Callable[..., Tensor]:
            def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
                outputs[layer] = output.detach().float().requires_grad_()
                return outputs[layer].to(output.dtype)

            return hook

        def attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any):
            every = -(-query.shape[:3].numel() * key.shape[2] // _MOST_LOGITS)
            logits = _logits(query, key, mask, every, **how)
            slope = _slope_of_a_draw(logits.detach(), seed)
            gradients = torch.autograd.grad(logits, [outputs[layer] for layer in self._heads], slope)
            self._tokens += outputs[next(iter(outputs))].shape[:-1].numel()
            for (layer, heads), gradient in zip(self._heads.items(), gradients, strict=True):
                by_head = gradient.view(-1, heads, gradient.shape[-1] // heads).transpose(0, 1)
                self._sums[layer] += every * by_head.mT @ by_head
            raise Stop

        if self._config is None:
            return
        hooks = [(layer.module, leaf(layer)) for layer in self._heads]
        with torch.enable_grad(), after(hooks), _attention(self._config, attend), suppress(Stop):
            run()

    def value(self, ranks: Ranks) -> dict[str, Tensor]:
        """By layer name, (heads, d, d) in nats for each token, of what all of `ranks` have added.

        Empty where nothing was seen: the model's attention is of its own kind.
        """
        tokens = torch.tensor(self._tokens)
        ranks.sum(tokens)
        for total in self._sums.values():
            ranks.sum(total)
        return {layer.name: total / tokens for layer, total in self._sums.items()} if tokens else {}


@contextmanager
def _attention(config: Any, function: Callable[..., Any]) -> Generator[None]:
    """A function that stands in for the model's attention from the point where queries and keys meet."""
    own = config._attn_implementation
    ALL_ATTENTION_FUNCTIONS[_NAME] = function
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        del ALL_ATTENTION_FUNCTIONS[_NAME]


def _logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    every: int,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """(B, heads, L / every, L) float32, −∞ where a query does not look; one column more where heads have a sink."""
    if mask is None:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    query, mask = query[:, :, ::every], mask[..., ::every, : key.shape[2]]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.float().view(-1, 1, 1).expand(*logits.shape[:-1], 1)], -1)
    return logits


def _slope_of_a_draw(logits: Tensor, seed: int) -> Tensor:
    """(B, heads, queries, L) ∂ log p_j / ∂ logits with one key j for each query, drawn from p."""
    p = logits.softmax(-1)
    generator = torch.Generator().manual_seed(seed)
    point = torch.rand(p.shape[:-1], generator=generator).to(p.device)[..., None]
    reached = p.cumsum(-1)
    drawn = torch.searchsorted(reached, point * reached[..., -1:])  # where p is 0 the sum does not grow
    return p.neg_().scatter_add_(-1, drawn.clamp_(max=p.shape[-1] - 1), torch.ones_like(point))
