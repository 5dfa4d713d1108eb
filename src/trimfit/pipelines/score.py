"""Scores a checkpoint on disk."""

import torch

from trimfit.calibration import read_documents, window_length
from trimfit.calibration.standard_library import EVALUATION, read_modules
from trimfit.checkpoints import load_checkpoint
from trimfit.evaluate import Score, score_text
from trimfit.pipelines.observer import Observer, Silent


def score_checkpoint(
    source: str,
    text: str,
    *,
    field: str = "text",
    split: str = "test",
    window: int | None = None,
    limit: int | None = None,
    device: torch.device | None = None,
    observer: Observer | None = None,
) -> Score:
    """Perplexity and bits per byte of a model directory or hub name on `text`, a source as for calibration.

    The model may be quantized, if trimfit wrote it. "demo" is the standard-library modules kept aside for evaluation.
    `window` is capped by the model's context, which it is when None, but at most 2048.
    """
    observer = observer or Silent()
    documents = read_modules(EVALUATION) if text == "demo" else read_documents(text, field=field, split=split)
    observer.stage(f"loading {source}")
    checkpoint = load_checkpoint(source, device, quantized=True)
    observer.stage(f"scoring {text}")
    length = window_length(window, checkpoint.model.config)
    return score_text(checkpoint.model, checkpoint.tokenizer, documents, length=length, limit_windows=limit)
