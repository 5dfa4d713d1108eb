"""The model as its own data: calibration windows drawn from its own distribution."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trimfit.calibration.turns import Place, Script, make_script
from trimfit.calibration.windows import context_length, windows_from_ids
from trimfit.errors import InputError
from trimfit.mode import forward_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

AT_ONCE = 32
NGRAM = 4

# Measured on windows of 256 to 4096 tokens. Repetition: real text up to 0.3, read as bytes or as code in a tiny
# vocabulary up to 0.63; trained models 0.02 to 0.04; a loop 0.76 to 0.95. Entropy, as a share of the largest: trained
# models 0.2 to 0.4, fresh weights 0.99. Noise written with confidence, as by large random weights, passes both.
_MOST_REPETITION = 0.7
_MOST_ENTROPY = 0.8


@dataclass(frozen=True)
class SelfSample:
    """Windows that a model wrote, and two measures of whether they look like text.

    - `windows`: (samples, length) int64, on the CPU.
    - `entropy`: of the distributions that the tokens were drawn from, the mean in nats.
    - `largest_entropy`: what it would be if all tokens of the vocabulary were equally likely.
    - `repetition`: share of the drawn tokens that end a 4-gram which the window had before.
    """

    windows: Tensor
    entropy: float
    largest_entropy: float
    repetition: float

    def record(self) -> dict[str, float]:
        """The measures alone."""
        return {
            "entropy": self.entropy,
            "largest_entropy": self.largest_entropy,
            "repetition": self.repetition,
        }

    def problem(self) -> str | None:
        """What is wrong with the windows, in words that can begin a sentence; None when they look like text."""
        if self.repetition > _MOST_REPETITION:
            return f"the model repeats itself ({self.repetition:.0%} of its {NGRAM}-grams are not new in their window)"
        if self.entropy > _MOST_ENTROPY * self.largest_entropy:
            return (
                f"the model writes noise ({self.entropy:.2f} nats per token, where {self.largest_entropy:.2f} is "
                "choosing blindly)"
            )
        return None

    def save(self, path: Path, seed: int) -> None:
        """Writes the windows as int32 .npy, in the order from which calibration with this seed restores theirs."""
        count = len(self.windows)
        numbers = torch.arange(count).unsqueeze(1).expand(count, 2)
        order = windows_from_ids(numbers, samples=count, length=2, seed=seed)[:, 0]
        np.save(path, self.windows[order.argsort()].to(torch.int32).numpy())


def sample_from_model(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    samples: int,
    length: int,
    seed: int,
    batch_size: int = AT_ONCE,
) -> SelfSample:
    """Windows drawn token by token from the model's own distribution: temperature 1, nothing cut off.

    A window begins with what the tokenizer puts before a text (BOS, as a rule); with EOS where it puts nothing; with
    any token, each as likely, where there is no EOS either. After an EOS it goes on as a stream of documents does. With
    a chat template a window is a stream of conversations: the model asks a user's question and answers it.

    **Arguments**

    - `model`: a causal language model of Transformers, on any device. It runs in eval mode and is left as it was; its
      generation config is not heeded.
    - `tokenizer`: the model's. Rows of the model beyond its vocabulary are never drawn.
    - `samples`, `length`: number of windows, and tokens in each.
    - `seed`: the same seed draws the same windows. The global random state is neither used nor changed.
    - `batch_size`: windows written together. Each has random numbers of its own, drawn beforehand, so this makes a
      difference only if it changes the rounding of the logits, and then hardly ever.

    Logs a warning when the model degenerates. Raises `InputError` for numbers out of range, windows longer than the
    model's context or too short for a drawn token, and logits that are NaN or infinite.
    """
    _check(model, samples, length, batch_size)
    rows = model.get_input_embeddings().get_parameter("weight").shape[0]
    known = torch.tensor(sorted(token for token in set(tokenizer.get_vocab().values()) if token < rows))
    script = make_script(tokenizer, set(known.tolist()), length)
    # In (0, 1]: inverting a distribution function at 0 could give a token whose probability is 0.
    uniforms = 1 - torch.rand(samples, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad(), forward_mode(model):
        parts = [_write(model, script, known, part) for part in uniforms.split(batch_size)]
    windows, entropies = (torch.cat(part) for part in zip(*parts, strict=True))
    sample = SelfSample(
        windows=windows,
        entropy=entropies.nanmean().item(),
        largest_entropy=math.log(len(known)),
        repetition=repetition(windows, ~entropies.isnan()),
    )
    if problem := sample.problem():
        log.warning("%s: calibrate on real text instead", problem)
    return sample


def repetition(windows: Tensor, counted: Tensor) -> float:
    """Share of the tokens marked in `counted` that end a 4-gram which their window had before; 0 without 4-grams.

    `windows` is (N, L) integers, `counted` (N, L) bool.
    """
    again = torch.tensor([list(_repeats(window)) for window in windows.tolist()], dtype=torch.float64)
    again = again[counted[:, NGRAM - 1 :]]
    return again.mean().item() if len(again) else 0.0


def _repeats(window: list[int]) -> Iterator[bool]:
    """Of each 4-gram in order, whether it was there before."""
    seen: set[tuple[int, ...]] = set()
    for ngram in zip(*(window[start:] for start in range(NGRAM)), strict=False):
        yield ngram in seen
        seen.add(ngram)


def _write(model: "PreTrainedModel", script: Script, known: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Windows written together, a token of each at a time: (B, L) int64, for random numbers `uniforms` (B, L).

    Also (B, L) float64, the entropy of the distribution that a token was drawn from, NaN where none was.
    """
    windows = torch.zeros(uniforms.shape, dtype=torch.int64)
    entropies = torch.full(uniforms.shape, math.nan, dtype=torch.float64)
    places = [Place(script) for _ in windows]
    any_token = known[(uniforms[:, :1] * len(known)).ceil().long() - 1]
    start = torch.tensor(script.opening) if script.opening else any_token
    first = start.shape[-1]
    windows[:, :first] = start

    call: Any = model
    cache: Any = None
    seen = 0  # tokens that the cache holds
    for position in range(first, windows.shape[1]):
        output = call(input_ids=windows[:, seen:position].to(model.device), past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        seen = 0 if cache is None else position
        drawn, entropy = _draw(output.logits[:, -1], known, uniforms[:, position])
        taken = [place.take(token) for place, token in zip(places, drawn.tolist(), strict=True)]
        windows[:, position] = torch.tensor([token for token, _ in taken])
        was_drawn = torch.tensor([was_drawn for _, was_drawn in taken])
        entropies[:, position] = entropy.masked_fill(~was_drawn, math.nan)
    return windows, entropies


def _draw(logits: Tensor, known: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """One of the `known` ids for each row of `logits` (B, vocabulary), and the entropy: (B,) int64, (B,) float64."""
    precise = torch.float32 if logits.device.type == "mps" else torch.float64  # which Apple's GPUs lack
    log_probabilities = logits[:, known.to(logits.device)].to(precise).log_softmax(-1)
    if log_probabilities.isnan().any():  # an infinite logit has made the whole row NaN
        raise InputError(
            "the model gives NaN or infinite logits on its own text: its weights are damaged or its dtype overflows; "
            "try to load it in float32"
        )
    probabilities = log_probabilities.exp()
    distribution = probabilities.cumsum(-1)
    targets = uniforms.to(precise).to(logits.device).unsqueeze(1) * distribution[:, -1:]
    drawn = torch.searchsorted(distribution, targets).squeeze(1)
    entropy = torch.special.entr(probabilities).sum(-1)
    return known[drawn.cpu()], entropy.cpu().double()


def _check(model: "PreTrainedModel", samples: int, length: int, batch_size: int) -> None:
    if samples < 1:
        raise InputError(f"at least 1 window is needed, but {samples} were asked for")
    if batch_size < 1:
        raise InputError(f"at least 1 window must be written at a time, but {batch_size} were asked for")
    if length < 2:
        raise InputError(f"a window must have at least 2 tokens, but {length} was asked for")
    longest = context_length(model.config)
    if longest is not None and length > longest:
        raise InputError(
            f"windows of {length} tokens were asked for, but the model's context is {longest}; ask for shorter windows"
        )
