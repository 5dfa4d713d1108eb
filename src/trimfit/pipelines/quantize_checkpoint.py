"""From a checkpoint on disk to a quantized checkpoint on disk."""

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from trimfit.calibration import CalibrationConfig
from trimfit.checkpoints import (
    Checkpoint,
    atomic_directory,
    check_output,
    fingerprint,
    load_checkpoint,
    save_checkpoint,
    write_sidecar,
)
from trimfit.checkpoints.gguf import check_gguf, write_gguf
from trimfit.checkpoints.packed import PackedWriter, check_packable
from trimfit.checkpoints.stream import Stream, open_stream
from trimfit.errors import InputError
from trimfit.models import find_blocks, select_layers
from trimfit.pipelines.checks import check_stream
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.prune_record import FORMAT
from trimfit.pipelines.quantize import quantize
from trimfit.pipelines.quantize_config import QuantizeConfig
from trimfit.pipelines.quantize_records import QuantizeReport
from trimfit.pipelines.quantize_stream import quantize_stream
from trimfit.pipelines.run_start import check_source_stays
from trimfit.pipelines.windows import SAMPLED, digest, draw_windows
from trimfit.quant import Quantized
from trimfit.quant.blocks import BlockTransform

Format = Literal["packed", "dense", "gguf"]
_FORMATS: dict[str, Format] = {"packed": "packed", "dense": "dense", "gguf": "gguf"}


def check_format(name: str, config: QuantizeConfig) -> Format:
    """The format of that name; `InputError` for others, and for what it cannot hold."""
    found = _FORMATS.get(name)
    if found is None:
        raise InputError(f"unknown format {name!r}: choose one of {', '.join(_FORMATS)}")
    if found == "gguf" and config.transform == "online":
        raise InputError("a GGUF file cannot hold online transformations: use another --transform, or --format packed")
    if found == "gguf" and not (config.symmetric and config.bits in (4, 8)):
        raise InputError("a GGUF file holds symmetric grids of 4 or 8 bits: give --symmetric, and --bits 4 or 8")
    return found


def quantize_checkpoint(
    source: str,
    out: Path,
    config: QuantizeConfig,
    calibration: CalibrationConfig | None = None,
    *,
    format: Format = "packed",
    device: torch.device,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> QuantizeReport:
    """Loads `source`, quantizes it and writes `out`, a checkpoint with a `trimfit.json` in it.

    - `calibration`: windows for Gram matrices; None asks for no data, reads none and runs no forward pass.
    - `format`: "packed" is compressed-tensors `pack-quantized`, which plain transformers and vLLM load; with online
      transformations it is one that only `trimfit.load` does. "dense" holds the levels as ordinary weights. "gguf" is
      one file for llama.cpp, for the grids that it can hold exactly.

    "packed" without calibration holds one decoder block in memory at a time, if `open_stream` can read the files so;
    everything else holds the model. Nothing is written before everything is done and checked. Raises `InputError` for
    an `out` that would replace `source` and for models that the format cannot hold; other errors: see
    `load_checkpoint`, `CalibrationConfig`, `quantize`, `save_checkpoint`.
    """
    observer = observer or Silent()
    if overwrite:
        check_source_stays(source, out)
    check_output(out, overwrite)
    observer.stage(f"loading {source}")
    stream = open_stream(source, device) if format == "packed" and calibration is None else None
    checkpoint = load_checkpoint(source, device) if stream is None else stream.checkpoint
    model = checkpoint.model
    layers = [layer for block in select_layers(model, find_blocks(model), config.ignore) for layer in block.layers]
    if format == "packed":
        check_packable(model, [layer.name for layer in layers])
    if format == "gguf":
        grids = {layer.name: config.grid.fitted(layer.weight.shape[1]) for layer in layers}
        check_gguf(model, checkpoint.tokenizer, grids)
    windows = sample = None
    if calibration is not None:
        windows, sample = draw_windows(checkpoint, calibration, config.batch_size, observer)
    sidecar: dict[str, Any] = {
        "format": FORMAT,
        "source": checkpoint.source,
        "calibration": None if calibration is None else calibration.model_dump(),
        "device": str(model.device if stream is None else stream.device),
        "fingerprints": {
            "model": fingerprint(model) if stream is None else check_stream(stream),
            "tokens": None if windows is None else digest(windows),
        },
        "self_sample": sample.record() if sample else None,
    }
    with atomic_directory(out, overwrite) as beside:
        if format == "packed":
            report = _packed(stream or checkpoint, config, windows, beside, sidecar, observer)
        elif format == "gguf":
            report = _gguf(checkpoint, config, windows, beside, sidecar, observer)
        else:
            report = quantize(model, config, windows, observer=observer)
            observer.stage(f"writing {out}")
            zeros = {f"{record.name}.weight": record.zeros for record in report.layers}
            save_checkpoint(checkpoint, beside, {**sidecar, **report.model_dump()}, sparsity=zeros)
        if sample is not None and calibration is not None:
            sample.save(beside / SAMPLED, calibration.seed)
    return report


def _packed(
    opened: Checkpoint | Stream,
    config: QuantizeConfig,
    windows: Tensor | None,
    directory: Path,
    sidecar: dict[str, Any],
    observer: Observer,
) -> QuantizeReport:
    """Layers are written as they come; what is not quantized follows, as folds may change it until the end."""
    checkpoint = opened.checkpoint if isinstance(opened, Stream) else opened
    writer = PackedWriter(checkpoint.model, directory)

    def sink(name: str, quantized: Quantized, transform: BlockTransform | None) -> None:
        writer.add(name, quantized, None if transform is None else transform.inverses)

    if isinstance(opened, Stream):
        report = quantize_stream(opened, config, observer=observer, sink=sink, keep=writer.add_plain)
    else:
        report = quantize(checkpoint.model, config, windows, observer=observer, sink=sink)
    observer.stage("writing the checkpoint")
    writer.finish()
    checkpoint.tokenizer.save_pretrained(directory)
    write_sidecar(directory, {**sidecar, **report.model_dump()})
    return report


def _gguf(
    checkpoint: Checkpoint,
    config: QuantizeConfig,
    windows: Tensor | None,
    directory: Path,
    sidecar: dict[str, Any],
    observer: Observer,
) -> QuantizeReport:
    """All codes are kept until the end: the file begins with what folds may still change."""
    done: dict[str, Quantized] = {}

    def sink(name: str, quantized: Quantized, transform: BlockTransform | None) -> None:
        done[name] = quantized

    model = checkpoint.model
    exact = torch.float16 if model.dtype == torch.float32 else None  # scales of 16-bit models are, as a rule
    report = quantize(model, config, windows, observer=observer, sink=sink, scale_dtype=exact)
    observer.stage("writing the GGUF file")
    grids = {name: quantized.grid for name, quantized in done.items()}
    write_gguf(model, checkpoint.tokenizer, grids, done.items(), directory / "model.gguf")
    checkpoint.tokenizer.save_pretrained(directory)
    write_sidecar(directory, {**sidecar, **report.model_dump()})
    return report
