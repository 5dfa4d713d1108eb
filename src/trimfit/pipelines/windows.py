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
    checkpoint: Checkpoint,
    calibration: CalibrationConfig,
    batch_size: int,
    observer: Observer,
    sample: SelfSample | None = None,
) -> tuple[Tensor, SelfSample | None]:
    """(count, length) int64 token ids; and those of them that the model wrote itself, with how they look.

    `sample` are these, where they are kept from a run that was stopped.
    """
    observer.stage(f"calibration windows from {calibration.source}")
    at_once = _WRITTEN_AT_ONCE * batch_size
    return calibration.draw(checkpoint.tokenizer, checkpoint.model, batch_size=at_once, sample=sample)


def digest(windows: Tensor) -> str:
    """SHA-256 of token ids."""
    return hashlib.sha256(windows.contiguous().numpy().tobytes()).hexdigest()
