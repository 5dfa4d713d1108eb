"""Calibration windows for a run, wherever they come from."""

import hashlib

from torch import Tensor

from trimfit.calibration import CalibrationConfig, SelfSample
from trimfit.checkpoints import Checkpoint
from trimfit.pipelines.observer import Observer

SAMPLED = "calibration.npy"  # not .safetensors: vLLM reads every such file of a directory as weights

# Windows written together for each window of a whole forward pass: a step takes one token of each.
_WRITTEN_AT_ONCE = 4


def draw_windows(
    checkpoint: Checkpoint, calibration: CalibrationConfig, batch_size: int, observer: Observer
) -> tuple[Tensor, SelfSample | None]:
    """(samples, length) int64 token ids; and how they look if the model wrote them itself."""
    observer.stage(f"calibration windows from {calibration.source}")
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    sample = calibration.self_sample(tokenizer, model, batch_size=_WRITTEN_AT_ONCE * batch_size)
    return (sample.windows, sample) if sample else (calibration.windows(tokenizer, model), None)


def digest(windows: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
