"""What a pruned checkpoint says about itself."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimfit.calibration import CalibrationConfig, SelfSample
from trimfit.pipelines.records import PruneReport
from trimfit.pipelines.windows import SAMPLED, digest

FORMAT = 1  # of trimfit.json


@dataclass(frozen=True)
class PruneRecord:
    """How a pruned model came about.

    - `source`, `fingerprint`: of the dense model; `device`: where it was.
    - `windows`: the calibration windows; `sample` is given when the model wrote them itself.
    - `run`: tells the output of one run from that of another.
    """

    source: str
    device: torch.device
    fingerprint: str
    calibration: CalibrationConfig
    windows: Tensor
    sample: SelfSample | None
    report: PruneReport
    run: str | None = None

    def sidecar(self) -> dict[str, Any]:
        """What `trimfit.json` holds."""
        return {
            "format": FORMAT,
            "run": self.run,
            "source": self.source,
            "calibration": self.calibration.model_dump(),
            "device": str(self.device),
            "fingerprints": {"model": self.fingerprint, "tokens": digest(self.windows)},
            "self_sample": self.sample.record() if self.sample else None,
            **self.report.model_dump(),
        }

    def zeros(self) -> dict[str, float]:
        """For each pruned weight, by its layer's name and ".weight", the share of zeros that it must have."""
        return {f"{record.name}.weight": record.sparsity for record in self.report.layers}

    def save_windows(self, directory: Path) -> None:
        """Keeps windows that the model itself wrote, as they can be had from nowhere else."""
        if self.sample is not None:
            self.sample.save(directory / SAMPLED, self.calibration.seed)
