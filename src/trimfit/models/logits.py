"""What errors in the outputs of Q and K do to attention: the curvature of its logits, whatever stands between."""

import copy
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trimfit.calibration import FisherSum, slope_of_a_draw
from trimfit.models.heads import QueryKey
from trimfit.models.hooks import Stop, after
from trimfit.models.structure import Layer
from trimfit.ranks import Ranks

MOST_LOGITS = 2**25  # of one window, at once: of long windows only every second query is seen, or every third, …

# What families hand on to attention that does not change its logits while no token is generated.
_HARMLESS = {
    *("dropout", "position_ids", "cache_position", "past_key_values", "use_cache", "num_items_in_batch"),
    *("output_attentions", "output_hidden_states", "output_router_logits"),
}
_numbers = count()  # of stand-ins: several may be there at one time, in several threads


def queries_apart(logits: int) -> int:
    """Which queries are seen of a window with so many logits: all for 1, every second for 2, …"""
    return -(-logits // MOST_LOGITS)


class LogitCurvature:
    """Sums the Fisher information of the attention weights in the outputs of Q and of K, head by head.

    With p the attention weights of a query, errors δ in its logits cost KL(p ‖ p') ≈ ½ Var_p(δ). For an output y of Q
    or K that is ½ δyᵀ E[g gᵀ] δy with g = ∂ log p_j / ∂y and a key j drawn from p: one draw for each query and head,
    and one backward pass from the logits to the two layers, through rotations and norms as the model has them. Draws
    are independent and have mean 0, so other tokens and heads do not mix in. No weight is touched, nothing is learned.

    - `pair`: of one block.
    """

    def __init__(self, model: PreTrainedModel, pair: QueryKey):
        self._attention = model.get_submodule(pair.query.name.rpartition(".")[0])
        self._sums = {
            layer: FisherSum(heads, len(layer.weight) // heads, model.device)
            for layer, heads in ((pair.query, pair.query_heads), (pair.key, pair.key_heads))
        }
        self._tokens = 0

    def add(self, run: Callable[[], object], seed: int) -> None:
        """Adds what is seen while `run` takes hidden states through the block. The same `seed`, the same draws."""
        outputs: dict[Layer, Tensor] = {}

        def leaf(layer: Layer) -> Callable[..., Tensor]:
            def hook(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
                outputs[layer] = output.detach().float().requires_grad_()
                return outputs[layer].to(output.dtype, copy=True)  # some models clamp it in place

            return hook

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **how: Any
        ) -> None:
            every = queries_apart(query.shape[:3].numel() * key.shape[2])
            logits = _logits(module, query, key, attention_mask, every, **how)
            if logits is None or not logits.requires_grad:
                raise Stop
            slope = slope_of_a_draw(logits.detach(), seed)
            wanted = [outputs[layer] for layer in self._sums if layer in outputs]
            found: Any = torch.autograd.grad(logits, wanted, slope, allow_unused=True)
            slopes: list[Tensor] = [slope for slope in found if slope is not None]
            if len(slopes) == len(self._sums):  # or the layers are named so, but are for something else
                self._tokens += query.shape[0] * query.shape[2]
                for total, slope in zip(self._sums.values(), slopes, strict=True):
                    total.add(slope, every)
            raise Stop

        if not hasattr(self._attention, "config"):
            return
        hooks = [(layer.module, leaf(layer)) for layer in self._sums]
        with torch.enable_grad(), after(hooks), _in_place_of_attention(self._attention, attend), suppress(Stop):
            run()

    def value(self, ranks: Ranks) -> dict[str, Tensor]:
        """By layer name, (heads, d, d) in nats for each token, of what all of `ranks` have added.

        Empty where nothing was seen: the model's attention is of its own kind.
        """
        seen = torch.tensor(self._tokens)
        ranks.sum(seen)
        tokens = int(seen)
        return {layer.name: total.value(tokens, ranks) for layer, total in self._sums.items()} if tokens else {}


@contextmanager
def _in_place_of_attention(attention: Any, function: Callable[..., Any]) -> Generator[None]:
    """A function that stands in for one module's attention from the point where queries and keys meet.

    The module asks a config of its own which function to take, so that no other module is concerned.
    """
    own, name = attention.config, f"trimfit_logits_{next(_numbers)}"
    ALL_ATTENTION_FUNCTIONS[name] = function
    attention.config = copy.copy(own)
    attention.config._attn_implementation_internal = name  # the property would reach into configs that are shared
    try:
        yield
    finally:
        attention.config = own
        del ALL_ATTENTION_FUNCTIONS[name]


def _logits(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Any,
    every: int,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> Tensor | None:
    """(B, heads, L / every, L) float32, −∞ where a query does not look; one column more where heads have a sink.

    None where anything is handed over that may change the logits and is not known here.
    """
    if any(value is not None for name, value in more.items() if name not in _HARMLESS):
        return None
    if mask is None:
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            return None
        mask = _causal(query.shape[2], key.shape[2], sliding_window, query.device)
    if not isinstance(mask, Tensor) or mask.dim() != 4:  # of other forms of attention
        return None
    query, mask = query[:, :, ::every], mask[..., ::every, : key.shape[2]]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    logits = query.float() @ key.float().mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask.float()
    if s_aux is not None:
        logits = torch.cat([logits, s_aux.float().view(-1, 1, 1).expand(*logits.shape[:-1], 1)], -1)
    return logits


def _causal(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """(1, 1, queries, keys) True where a query looks: at itself and before it, no more than `window` keys in all."""
    seen = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device).tril()
    return seen if window is None else seen.triu(1 - window)
