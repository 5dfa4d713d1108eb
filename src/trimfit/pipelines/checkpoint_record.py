"""What a compressed checkpoint says about itself, however it was compressed."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from trimfit.calibration import CalibrationConfig, SelfSample
from trimfit.pipelines.windows import SAMPLED, digest

FORMAT = 1  # of trimfit.json


@dataclass(frozen=True)
class CheckpointRecord:
    """How a compressed model came about.

    - `source`, `fingerprint`: of the dense model; `device`: where it was.
    - `calibration`, `windows`: None where no data was used; `sample` are those that the model wrote itself, if any.
    - `run`: tells the output of one run from that of another.
    """

    source: str
    device: torch.device
    fingerprint: str
    calibration: CalibrationConfig | None
    windows: Tensor | None
    sample: SelfSample | None
    report: BaseModel
    run: str | None = None

    def sidecar(self) -> dict[str, Any]:
        """What `trimfit.json` holds."""
        return {
            "format": FORMAT,
            "run": self.run,
            "source": self.source,
            "calibration": self.calibration.model_dump() if self.calibration else None,
            "device": str(self.device),
            "fingerprints": {
                "model": self.fingerprint,
                "tokens": None if self.windows is None else digest(self.windows),
            },
            "self_sample": self.sample.record() if self.sample else None,
            **self.report.model_dump(),
        }

    def save_windows(self, directory: Path) -> None:
        """Keeps windows that the model itself wrote, as they can be had from nowhere else."""
        if self.sample is not None and self.calibration is not None:
            self.sample.save(directory / SAMPLED, self.calibration.seed)
