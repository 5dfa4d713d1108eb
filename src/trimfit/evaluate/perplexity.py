"""The mean negative log-likelihood a causal language model gives to tokens and to text."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from trimfit.calibration import added_tokens, check_ids, context_length
from trimfit.errors import InputError, RunError
from trimfit.evaluate.token_bytes import token_bytes
from trimfit.mode import forward_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BATCH_TOKENS = 8192
_UPCAST_ENTRIES = 1 << 24  # logits turned to float32 at a time: 64 MiB, whatever the vocabulary


@dataclass(frozen=True)
class Score:
    """How well a model predicts a text, with what is needed to compare the number with others.

    **Attributes**

    - `nats`: mean negative log-likelihood per predicted token.
    - `perplexity`: exp(nats); infinite where that is too large for a float.
    - `bits_per_byte`: total negative log-likelihood in bits, per UTF-8 byte of the predicted tokens. Unlike the others
      it can be compared between tokenizers.
    - `tokens`: number of predicted tokens.
    - `bytes`: number of UTF-8 bytes they stand for.
    - `window`: the most tokens the model saw at once, BOS included.
    - `documents`: number of documents with a predicted token.
    """

    nats: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    window: int
    documents: int


def perplexity(
    model: "PreTrainedModel", tokens: Tensor | Sequence[Tensor], *, batch_tokens: int = BATCH_TOKENS
) -> float:
    """exp of the mean negative log-likelihood over all tokens but the first of each window.

    **Arguments**

    - `model`: a causal language model of Transformers, on any device, in any floating dtype. The loss is computed in
      float32 and summed in float64. The model is evaluated in eval mode, and each module is given back in the mode it
      had.
    - `tokens`: integer token ids, (windows, length), or a sequence of windows of shape (length,) whose lengths differ.
      Windows are independent; shorter ones are padded on the right, and the padding is in no loss. BOS is not added.
    - `batch_tokens`: the most tokens in a batch, padding included, unless one window has more. Its logits have
      batch_tokens · vocabulary entries in the model's dtype.

    Raises `InputError` for other shapes or dtypes, ids outside the model's vocabulary, windows longer than its context,
    or no token to predict; `RunError` when the model gives NaN.
    """
    windows = _as_windows(tokens)
    total, count = _negative_log_likelihood(model, windows, first_target=1, batch_tokens=batch_tokens)
    return _exp(total / count)


def score_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    documents: list[str],
    *,
    length: int,
    limit_windows: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Score:
    """Scores documents in windows that do not overlap and do not span documents.

    Each window begins with what the tokenizer puts before a text (BOS, as a rule), followed by the next tokens of the
    document. Then every token of the text is predicted exactly once, and `bytes` is the size of the documents. Where
    the tokenizer puts nothing before a text, the first token of each window is context only, and its bytes count not.
    Special tokens that the tokenizer adds are never predicted.

    **Arguments**

    - `model`, `batch_tokens`: as for `perplexity`.
    - `tokenizer`: the model's. The byte counts are exact for fast tokenizers; for one written in Python, which
      keeps no offsets, each token counts as the mean of its document: exact only where whole documents are predicted.
    - `documents`: texts; those without tokens are skipped.
    - `length`: the most tokens in a window, BOS included.
    - `limit_windows`: score only the first so many windows.

    Raises `InputError` for a length without room for a prediction or beyond the model's context, ids outside its
    vocabulary, or nothing to predict; `RunError` when the model gives NaN.
    """
    before = added_tokens(tokenizer).before
    context = max(len(before), 1)
    if length <= context:
        raise InputError(f"a window must have more than {context} tokens to predict one, but {length} was asked for")
    if limit_windows is not None and limit_windows < 1:
        raise InputError(f"at least 1 window is needed, but {limit_windows} were asked for")
    cut = _text_windows(tokenizer, documents, before, length)
    windows = list(islice(cut, limit_windows))
    total, count = _negative_log_likelihood(model, [w.ids for w in windows], context, batch_tokens)
    size = sum(window.bytes for window in windows)
    return Score(
        nats=total / count,
        perplexity=_exp(total / count),
        bits_per_byte=total / math.log(2) / size if size else math.inf,
        tokens=count,
        bytes=size,
        window=length,
        documents=len({window.document for window in windows}),
    )


class _TextWindow(NamedTuple):
    ids: Tensor
    bytes: int  # of the predicted tokens
    document: int


def _text_windows(
    tokenizer: "PreTrainedTokenizerBase", documents: Iterable[str], before: list[int], length: int
) -> Iterator[_TextWindow]:
    """Windows with at least one predicted token, in the order of the text."""
    step = length - len(before)
    unpredicted = 0 if before else 1
    for document, text in enumerate(documents):
        ids, sizes = token_bytes(tokenizer, text)
        for start in range(0, len(ids) - unpredicted, step):
            window = torch.tensor([*before, *ids[start : start + step]])
            yield _TextWindow(window, sum(sizes[start + unpredicted : start + step]), document)


def _as_windows(tokens: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """Windows of shape (length,), int64, on the CPU."""
    if isinstance(tokens, Tensor) and tokens.dim() != 2:
        raise InputError(
            f"tokens must be (windows, length) or a list of windows, but their shape is {tuple(tokens.shape)}; "
            "cut a stream in windows first"
        )
    windows = list(tokens)
    for window in windows:
        if window.dim() != 1:
            raise InputError(f"each window must have shape (length,), but one has {tuple(window.shape)}")
        if window.is_floating_point() or window.is_complex() or window.dtype == torch.bool:
            raise InputError(f"token ids must be integers, but they are {window.dtype}")
    return [window.to("cpu", torch.int64) for window in windows]


def _negative_log_likelihood(
    model: "PreTrainedModel", windows: list[Tensor], first_target: int, batch_tokens: int
) -> tuple[float, int]:
    """Total in nats, and number of tokens predicted: in each window those from position `first_target` on."""
    if batch_tokens < 1:
        raise InputError(f"a batch must have at least 1 token, but batch_tokens is {batch_tokens}")
    count = sum(max(len(window) - first_target, 0) for window in windows)
    if count == 0:
        raise InputError("there is no token to predict: give text, or windows of at least 2 tokens")
    _check_windows(model, windows)
    with torch.inference_mode(), forward_mode(model):
        batches = _batches([len(window) for window in windows], first_target, batch_tokens)
        total = sum(_batch_loss(model, windows, batch, first_target) for batch in batches)
    return total, count


def _batch_loss(model: "PreTrainedModel", windows: list[Tensor], batch: list[int], first_target: int) -> float:
    # A function of its own so that the logits are freed before the next batch makes others.
    rows = [windows[i] for i in batch]
    logits = _logits(model, nn.utils.rnn.pad_sequence(rows, batch_first=True).to(_input_device(model)))
    total = 0.0
    for i, row, row_logits in zip(batch, rows, logits, strict=True):
        losses = _losses(row_logits[first_target - 1 : len(row) - 1], row[first_target:])
        _check_losses(losses, i, first_target)
        total += losses.sum().item()
    return total


def _check_windows(model: "PreTrainedModel", windows: list[Tensor]) -> None:
    check_ids(torch.cat(windows), _vocabulary_size(model))
    longest, context = max(len(window) for window in windows), context_length(model.config)
    if context is not None and longest > context:  # with learned positions the model would fail, on a GPU fatally
        raise InputError(f"a window has {longest} tokens, but the model's context is {context}; cut shorter windows")


def _vocabulary_size(model: "PreTrainedModel") -> int:
    embeddings: Any = model.get_input_embeddings()
    return embeddings.weight.shape[0]


def _input_device(model: "PreTrainedModel") -> torch.device:
    # Weights that are offloaded are on "meta"; the hooks that bring them also move the inputs.
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def _batches(lengths: list[int], first_target: int, batch_tokens: int) -> Iterator[list[int]]:
    """Indices of windows of similar length, the longest first so that a lack of memory shows at once."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if lengths[i] <= first_target:
            break
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    yield batch


def _logits(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    # No attention mask: attention is causal, so padding on the right reaches no token that is scored.
    output: Any = model(input_ids=ids, use_cache=False)
    logits: Tensor | None = getattr(output, "logits", None)
    if logits is None:
        raise InputError(f"{type(model).__name__} gives no logits; load the model with AutoModelForCausalLM")
    return logits


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods, float64 (n,) on the CPU, of `targets` (n,) given `logits` (n, vocabulary)."""
    targets = targets.to(logits.device)
    at_once = max(_UPCAST_ENTRIES // logits.shape[1], 1)
    parts = [slice(start, start + at_once) for start in range(0, len(targets), at_once)]
    losses = [nn.functional.cross_entropy(logits[part].float(), targets[part], reduction="none") for part in parts]
    return torch.cat(losses).cpu().double()


def _check_losses(losses: Tensor, window: int, first_target: int) -> None:
    nan = losses.isnan()
    if nan.any():
        position = int(nan.nonzero()[0]) + first_target
        raise RunError(
            f"the model gives NaN on token {position} of window {window}: its weights are damaged or its "
            "dtype overflows; try to load it in float32"
        )


def _exp(nats: float) -> float:
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
