"""From a checkpoint on disk to a pruned checkpoint on disk."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimfit.calibration import CalibrationConfig, SelfSample
from trimfit.checkpoints import (
    Checkpoint,
    atomic_directory,
    check_output,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
)
from trimfit.errors import InputError
from trimfit.pipelines.config import PruneConfig
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.prune import prune
from trimfit.pipelines.records import PruneReport
from trimfit.pipelines.windows import SAMPLED, digest, draw_windows

FORMAT = 1  # of trimfit.json


def prune_checkpoint(
    source: str,
    out: Path,
    config: PruneConfig,
    calibration: CalibrationConfig,
    *,
    device: torch.device,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> PruneReport:
    """Loads `source`, prunes it and writes `out`: a plain Hugging Face checkpoint with a `trimfit.json` in it.

    With calibration on the model itself `calibration.npy` in it holds the windows. Nothing is written before everything
    is done and checked. Raises `InputError` for an `out` that would replace `source`; other errors: see
    `load_checkpoint`, `CalibrationConfig`, `prune`, `save_checkpoint`.
    """
    observer = observer or Silent()
    if overwrite:
        check_source_stays(source, out)
    check_output(out, overwrite)
    observer.stage(f"loading {source}")
    checkpoint = load_checkpoint(source, device)
    windows, sample = draw_windows(checkpoint, calibration, config.batch_size, observer)
    model_fingerprint = fingerprint(checkpoint.model)
    report = prune(checkpoint.model, windows, config, observer=observer)
    observer.stage(f"writing {out}")
    save_pruned(checkpoint, out, report, calibration, windows, model_fingerprint, sample=sample, overwrite=overwrite)
    return report


def save_pruned(
    checkpoint: Checkpoint,
    out: Path,
    report: PruneReport,
    calibration: CalibrationConfig,
    windows: Tensor,
    model_fingerprint: str,
    *,
    sample: SelfSample | None = None,
    overwrite: bool,
) -> None:
    """Writes a pruned model with the record of how it came about, and checks its zeros.

    `windows` are the calibration windows, `model_fingerprint` is that of the dense model. `sample` is given when that
    model wrote the windows; they are kept then, as they can be had from nowhere else.
    """
    sidecar: dict[str, Any] = {
        "format": FORMAT,
        "source": checkpoint.source,
        "calibration": calibration.model_dump(),
        "device": str(checkpoint.model.device),
        "fingerprints": {
            "model": model_fingerprint,
            "tokens": digest(windows),
        },
        "self_sample": sample.record() if sample else None,
        **report.model_dump(),
    }
    zeros = {f"{record.name}.weight": record.sparsity for record in report.layers}
    with atomic_directory(out, overwrite) as beside:
        save_checkpoint(checkpoint, beside, sidecar, sparsity=zeros)
        if sample is not None:
            sample.save(beside / SAMPLED, calibration.seed)


def check_source_stays(source: str, out: Path) -> None:
    """`out` replaces all that lies there: never the model itself, or a folder around it."""
    model = Path(source).expanduser().resolve()
    if model.is_dir() and model.is_relative_to(out.resolve()):
        raise InputError(f"writing {out} would destroy the model {source} itself; choose another output")
