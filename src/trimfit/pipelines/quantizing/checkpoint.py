"""From a checkpoint on disk to a quantized checkpoint on disk."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimfit.calibration import CalibrationConfig, SelfSample
from trimfit.checkpoints import atomic_directory, load_checkpoint
from trimfit.checkpoints.stream import open_stream
from trimfit.models import find_blocks, select_layers
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.opened import InMemory, Offloaded, check_run_space
from trimfit.pipelines.quantizing.config import QuantizeConfig
from trimfit.pipelines.quantizing.quantize import QuantizeRun
from trimfit.pipelines.quantizing.records import QuantizeReport
from trimfit.pipelines.quantizing.save import Format, QuantizeRecord, Result, check_offload
from trimfit.pipelines.quantizing.weight_moments import WeightMoments
from trimfit.pipelines.runs.directory import RunDirectory, run_path
from trimfit.pipelines.runs.start import (
    check_same_model,
    enter_run,
    identity,
    report_in,
    take_finished,
    there,
    threads_of,
)
from trimfit.pipelines.windows import draw_windows
from trimfit.ranks import ALONE, Ranks


def quantize_checkpoint(
    source: str,
    out: Path,
    config: QuantizeConfig,
    calibration: CalibrationConfig | None = None,
    *,
    format: Format = "packed",
    device: torch.device,
    overwrite: bool = False,
    offload: bool = False,
    memory_limit: int | None = None,
    ranks: Ranks = ALONE,
    observer: Observer | None = None,
) -> QuantizeReport:
    """Loads `source`, quantizes it and writes `out`, a checkpoint with a `trimfit.json` in it.

    - `calibration`: windows for Gram matrices; None asks for no data, reads none and runs no forward pass.
    - `format`: "packed" is compressed-tensors `pack-quantized`, which plain transformers and vLLM load; with online
      transformations it is one that only `trimfit.load` does. "dense" holds the levels as ordinary weights. "gguf" is
      one file for llama.cpp, for the grids that it can hold exactly.
    - `offload`: holds one decoder block at a time on `device`, and leaves the others in their files; not for "gguf".
      "packed" without calibration does so by itself, if `open_stream` can read the files so.
    - `memory_limit`: bytes of hidden states in memory; those above it are in files.
    - `ranks`: the processes that share the work; only the first of them writes.

    What is finished is kept in a `RunDirectory` beside `out`: when a run was ended or killed, the same call goes on
    from there. `out` is there when everything is done and checked. Raises `InputError` for an `out` that would replace
    `source`, for models that the format cannot hold or that cannot be offloaded, and for a run that was begun with
    something else; other errors: see `load_checkpoint`, `CalibrationConfig`, `quantize`, `save_checkpoint`.
    """
    observer = observer or Silent()
    request = {
        "command": "quantize",
        "source": source,
        "config": config.model_dump(),
        "calibration": None if calibration is None else calibration.model_dump(),
        "file_format": format,
        "device": str(device) if ranks.count == 1 else device.type,
        "overwrite": overwrite,
        "offload": offload,
        "memory_limit": memory_limit,
    }
    finished = ranks.first(lambda: take_finished(out, request))
    if finished is not None:
        return report_in(finished, QuantizeReport)
    with ExitStack() as stack:
        run = ranks.first_only(lambda: enter_run(stack, source, out, overwrite, request))
        observer.stage(f"loading {source}")

        def open_model() -> tuple[Result, str]:
            opened = _open(source, device, calibration, format, offload)
            model = opened.checkpoint.model
            result = Result(opened, select_layers(model, find_blocks(model), config.ignore), format, config)
            result.check()
            return result, result.prepare(data=calibration is not None)

        result, model_fingerprint = ranks.everywhere(open_model)
        opened, blocks = result.opened, result.blocks
        checkpoint, model = opened.checkpoint, opened.checkpoint.model
        check_same_model(source, model_fingerprint, ranks)

        def begin(run: RunDirectory) -> None:
            check_run_space(out, result.disk(data=calibration is not None), run)
            run.open(_identity(model_fingerprint, config, calibration, format))

        def windows_of(run: RunDirectory) -> tuple[Tensor | None, SelfSample | None]:
            text = calibration
            if text is None:
                return None, None
            return run.windows(lambda sample: draw_windows(checkpoint, text, config.batch_size, observer, sample))

        ranks.first(lambda: begin(there(run)))
        stack.enter_context(threads_of(run, ranks))
        windows, sample = ranks.first(lambda: windows_of(there(run)))
        kept = result.kept(run) if run else None
        folder = run_path(out)  # which processes on other machines may not see
        report = QuantizeRun(
            model,
            blocks,
            _moments(opened) if windows is None else windows,
            config,
            observer,
            ledger=kept,
            placement=opened.placement(memory_limit, folder if folder.is_dir() else None),
            ranks=ranks,
            scale_dtype=torch.float16 if format == "gguf" else None,  # as GGUF has it
            device=opened.device,
        ).run()

        def save(run: RunDirectory) -> None:
            record = QuantizeRecord(
                checkpoint.source,
                opened.device,
                model_fingerprint,
                calibration,
                windows,
                sample,
                report,
                run.id,
                format,
            )
            with atomic_directory(out, overwrite, run.result) as directory:
                result.save(directory, result.kept(run), record)
                record.save_windows(directory)

        observer.stage(f"writing {out}")
        ranks.first(lambda: save(there(run)))
    return report


def _open(
    source: str, device: torch.device, calibration: CalibrationConfig | None, format: Format, offload: bool
) -> InMemory | Offloaded:
    if offload:
        check_offload(format, calibration)
        return Offloaded.open(source, device, calibration)
    stream = open_stream(source, device) if format == "packed" and calibration is None else None
    return InMemory(load_checkpoint(source, device)) if stream is None else Offloaded(stream)


def _identity(
    model_fingerprint: str, config: QuantizeConfig, calibration: CalibrationConfig | None, format: Format
) -> dict[str, Any]:
    """What must be the same for a run to go on."""
    drawn = {"source": None} if calibration is None else calibration.model_dump()
    asked = {**config.model_dump(), "format": format}
    return identity("quantize", model_fingerprint, config=asked, calibration=drawn)


def _moments(opened: InMemory | Offloaded) -> WeightMoments:
    model = opened.checkpoint.model
    if isinstance(opened, InMemory):
        return WeightMoments(model)
    embedding = model.get_input_embeddings().get_parameter("weight")
    name = next(name for name, parameter in model.named_parameters() if parameter is embedding)
    return WeightMoments(model, opened.stream.read(name), opened.device)
