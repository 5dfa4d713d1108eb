"""Goes on with a run that was ended or killed."""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel

from trimfit.calibration import CalibrationConfig
from trimfit.checkpoints import SIDECAR, resolve_device
from trimfit.errors import InputError
from trimfit.pipelines.observer import Observer
from trimfit.pipelines.pruning.checkpoint import prune_checkpoint
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.records import PruneReport
from trimfit.pipelines.quantizing.checkpoint import quantize_checkpoint
from trimfit.pipelines.quantizing.config import QuantizeConfig
from trimfit.pipelines.quantizing.records import QuantizeReport
from trimfit.pipelines.quantizing.save import Format
from trimfit.pipelines.runs.directory import REQUEST, RunDirectory, run_path
from trimfit.pipelines.runs.start import report_in
from trimfit.ranks import ALONE, Ranks, local_device


class _Request(BaseModel):
    """What a run was asked for, as it lies in its directory."""

    run: str
    command: Literal["prune", "quantize"]
    source: str
    config: dict[str, Any]
    calibration: dict[str, Any] | None
    device: str
    overwrite: bool
    offload: bool
    memory_limit: int | None
    file_format: Format = "packed"
    directory: str
    local: bool


@dataclass(frozen=True)
class Resumed:
    """A run that is finished now: where it wrote, on which windows if any, and its report.

    `file_format` is that of a quantized checkpoint.
    """

    out: Path
    calibration: CalibrationConfig | None
    report: PruneReport | QuantizeReport
    file_format: Format = "dense"


def resume(
    directory: Path,
    *,
    device: torch.device | None = None,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> Resumed:
    """Does what is left of a run.

    - `directory`: the output that the run was to write, or the run directory beside it. Relative names of the model
      and the text are taken from where the run was begun.
    - `device`: to go on with; the one that it began on, if None.
    - `ranks`: the processes that share what is left, not necessarily as many as before.

    **Returns** the report of the whole run; when everything is done already, that which is there. Raises `InputError`
    when there is nothing to go on with, or when model, text or versions are not what they were; and as
    `prune_checkpoint` and `quantize_checkpoint` do.
    """
    out = directory.absolute()
    if not out.name:
        raise InputError(f"{directory} cannot be the output of a run; give the directory that the run was to write")
    out = out.with_name(out.name.removesuffix(".run")) if out.name != ".run" else out
    request, finished = ranks.first(lambda: _look(out))
    if finished is not None:
        return finished
    assert request is not None
    device = device or ranks.everywhere(lambda: _device(request.device, ranks))
    go_on = _quantize if request.command == "quantize" else _prune
    began = Path(request.directory)
    with contextlib.chdir(began if began.is_dir() else Path.cwd()):  # names of files were given from there
        _check_there(request)
        return go_on(request, out, device, ranks, observer)  # out may have been moved, with all that is beside it


def _device(began_on: str, ranks: Ranks) -> torch.device:
    """The one that the run began on. `InputError` when it is not here."""
    try:
        return local_device(resolve_device(began_on if ranks.count == 1 else began_on.partition(":")[0]))
    except InputError as error:
        raise InputError(
            f"the run began on the device {began_on!r}, which is not available here; give --device cpu to go on there, "
            "or --device auto"
        ) from error


def _check_there(request: _Request) -> None:
    model = Path(request.source).expanduser().absolute()
    if request.local and not model.is_dir():  # its name could be one on the hub
        raise InputError(f"the run began with the model in {model}, which is not there any more; put it back")


def _prune(request: _Request, out: Path, device: torch.device, ranks: Ranks, observer: Observer | None) -> Resumed:
    calibration = CalibrationConfig.model_validate(request.calibration)
    report = prune_checkpoint(
        request.source,
        out,
        PruneConfig.model_validate(request.config),
        calibration,
        device=device,
        overwrite=request.overwrite,
        offload=request.offload,
        memory_limit=request.memory_limit,
        ranks=ranks,
        observer=observer,
    )
    return Resumed(out, calibration, report)


def _quantize(request: _Request, out: Path, device: torch.device, ranks: Ranks, observer: Observer | None) -> Resumed:
    calibration = _calibration(request.calibration)
    report = quantize_checkpoint(
        request.source,
        out,
        QuantizeConfig.model_validate(request.config),
        calibration,
        format=request.file_format,
        device=device,
        overwrite=request.overwrite,
        offload=request.offload,
        memory_limit=request.memory_limit,
        ranks=ranks,
        observer=observer,
    )
    return Resumed(out, calibration, report, request.file_format)


def _calibration(record: dict[str, Any] | None) -> CalibrationConfig | None:
    return None if record is None else CalibrationConfig.model_validate(record)


def _look(out: Path) -> tuple[_Request | None, Resumed | None]:
    """What is to be done, or what is there when everything is done."""
    request = _request(out)
    finished = _finished(out)
    if finished is not None and (request is None or request.run == finished["run"]):
        if run_path(out).exists():
            with RunDirectory(out, {}):  # which removes it, under its lock
                pass
        kind = PruneReport if _is_of(finished, PruneReport) else QuantizeReport
        report = report_in(finished, kind)
        return None, Resumed(out, _calibration(finished["calibration"]), report, finished.get("file_format", "dense"))
    if request is None and run_path(out).is_dir():
        raise InputError(f"{run_path(out)} does not tell what to do; give the command of the run again, which goes on")
    if request is None:
        raise InputError(
            f"there is no run to go on with: neither {out} nor {run_path(out)} is one of trimfit prune or quantize (a "
            "comparison goes on by its own command again)"
        )
    return request, None


def _request(out: Path) -> _Request | None:
    """What the run was asked for; None when there is no run."""
    file = run_path(out) / REQUEST
    if not file.is_file():
        return None
    try:
        return _Request.model_validate_json(file.read_bytes())
    except ValueError:
        raise InputError(f"{file} is damaged; give the command of the run again, which goes on") from None


def _finished(out: Path) -> dict[str, Any] | None:
    """The record of a compressed model that is there."""
    try:
        record = json.loads((out / SIDECAR).read_text(encoding="utf-8"))
        return record if "run" in record and (_is_of(record, PruneReport) or _is_of(record, QuantizeReport)) else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _is_of(record: dict[str, Any], report: type[PruneReport] | type[QuantizeReport]) -> bool:
    return record.keys() >= report.model_fields.keys()
