"""Goes on with a run that was ended or killed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from trimfit.calibration import CalibrationConfig
from trimfit.checkpoints import SIDECAR
from trimfit.errors import InputError
from trimfit.pipelines.config import PruneConfig
from trimfit.pipelines.observer import Observer
from trimfit.pipelines.prune_checkpoint import prune_checkpoint
from trimfit.pipelines.records import PruneReport
from trimfit.pipelines.run_directory import REQUEST, RunDirectory, run_path
from trimfit.ranks import ALONE, Ranks, local_device


@dataclass(frozen=True)
class Resumed:
    """A run that is finished now: where it wrote, on which windows, and its report."""

    out: Path
    calibration: CalibrationConfig
    report: PruneReport


def resume(
    directory: Path,
    *,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> Resumed:
    """Does what is left of a run.

    - `directory`: the output that the run was to write, or the run directory beside it.
    - `device`: to go on with; the one that it began on, if None.
    - `ranks`: the processes that share what is left, not necessarily as many as before.

    **Returns** the report of the whole run; when everything is done already, that which is there. Raises `InputError`
    when there is nothing to go on with, or when model, text or versions are not what they were; and as
    `prune_checkpoint` does.
    """
    out = Path(str(directory).removesuffix(".run")) if directory.name.endswith(".run") else directory
    request, finished = ranks.first(lambda: _look(out))
    if finished is not None:
        return finished
    assert request is not None
    out, calibration = Path(request["out"]), CalibrationConfig.model_validate(request["calibration"])
    report = prune_checkpoint(
        request["source"],
        out,
        PruneConfig.model_validate(request["config"]),
        calibration,
        device=device or local_device(torch.device(request["device"])),
        overwrite=request["overwrite"],
        offload=request["offload"],
        memory_limit=request["memory_limit"],
        ranks=ranks,
        observer=observer,
    )
    return Resumed(out, calibration, report)


def _look(out: Path) -> tuple[dict[str, Any] | None, Resumed | None]:
    """What is to be done, or what is there when everything is done."""
    request = _request(out)
    finished = _finished(out)
    if finished is not None and (request is None or request["run"] == finished["run"]):
        if run_path(out).exists():
            with RunDirectory(out, {}):  # which removes it, under its lock
                pass
        report = PruneReport.model_validate({name: finished[name] for name in PruneReport.model_fields})
        return None, Resumed(out, CalibrationConfig.model_validate(finished["calibration"]), report)
    if request is None:
        raise InputError(f"there is no run to go on with: neither {out} nor {run_path(out)} is one of trimfit prune")
    return request, None


def _request(out: Path) -> dict[str, Any] | None:
    """What the run was asked for; None when there is no run."""
    file = run_path(out) / REQUEST
    if not file.is_file():
        return None
    try:
        return json.loads(file.read_text())
    except ValueError:
        raise InputError(f"{file} is damaged; give the command of the run again, which goes on") from None


def _finished(out: Path) -> dict[str, Any] | None:
    """The record of a pruned model that is there."""
    try:
        record = json.loads((out / SIDECAR).read_text(encoding="utf-8"))
        return record if record.keys() >= PruneReport.model_fields.keys() else None
    except (OSError, ValueError, AttributeError):
        return None
