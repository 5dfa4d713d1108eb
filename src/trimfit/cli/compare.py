"""`trimfit compare`: reads arguments, calls one function, prints."""

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from trimfit.cli import options
from trimfit.errors import InputError, RunError, TrimfitError

_Axis = list[str] | None


class _Interrupted(TrimfitError):
    """Ctrl-C; unlike elsewhere something is kept."""

    exit_code = 130


def compare(
    model: options.Model,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Folder for tables, plots and journal; goes on with what is there.")
    ] = Path("trimfit-compare"),
    selectors: Annotated[_Axis, typer.Option(help="Of masks, as in wanda,joint. \\[default: all]")] = None,
    updates: Annotated[
        _Axis, typer.Option(help="Of what is kept: none, own, optimal (the refit). \\[default: all]")
    ] = None,
    targets: Annotated[_Axis, typer.Option(help="Of the refit: dense, layer. \\[default: as for prune]")] = None,
    allocations: Annotated[
        _Axis, typer.Option(help="Of the sparsity over layers: uniform, owl, error. \\[default: as for prune]")
    ] = None,
    row_weights: Annotated[
        _Axis, typer.Option(help="What errors of Q and K count: equal, attention. \\[default: as for prune]")
    ] = None,
    reorder: Annotated[
        _Axis, typer.Option(help="Inputs into an order that suits an N:M pattern: yes, no. \\[default: as for prune]")
    ] = None,
    sparsity: Annotated[
        _Axis, typer.Option(help="Shares to remove, as in 0.5,0.6. \\[default: 0.5, or none with --patterns]")
    ] = None,
    patterns: Annotated[_Axis, typer.Option(help="N:M patterns, as in 2:4,4:8.")] = None,
    seeds: Annotated[int, typer.Option(help="Draws of the calibration windows.")] = 5,
    calibration: Annotated[
        _Axis, typer.Option(help="As for prune; several, as in my-text.txt,self, are an axis. \\[default: demo]")
    ] = None,
    text: Annotated[str, typer.Option(help="What is scored: text file, .jsonl, hub data set, or 'demo'.")] = "demo",
    field: options.Field = "text",
    split: Annotated[str, typer.Option(help="Split of a calibration data set on the hub.")] = "train",
    text_split: Annotated[str, typer.Option(help="Split of a scored data set on the hub.")] = "test",
    samples: options.Samples = 128,
    sequence_length: options.SequenceLength = None,
    window: options.Window = None,
    tasks: Annotated[_Axis, typer.Option(help="Tasks to score too, as for trimfit eval.")] = None,
    limit: options.Limit = None,
    scope: options.Scope = None,
    damping: options.Damping = "0.01",
    capture: options.Capture = "group",
    ignore: options.Ignore = None,
    keep_dense: options.KeepDense = None,
    held_out: options.HeldOut = 0.125,
    guard: Annotated[
        bool,
        typer.Option("--guard", help="Let a layer have simpler weights where these are better on held-out windows."),
    ] = False,
    batch_size: options.BatchSize = 8,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Prune MODEL in every combination given, each from the dense model, and compare: tables and plots over seeds.

    Lists are separated by commas, or the option is repeated. Every finished cell is kept at once: the same command
    goes on where it was interrupted, and tries again what failed.
    """
    from trimfit.calibration import CalibrationConfig
    from trimfit.checkpoints import resolve_device
    from trimfit.cli import show
    from trimfit.pipelines import CompareConfig
    from trimfit.pipelines import compare as run
    from trimfit.pipelines.comparing.report import PLOTS, table

    axes: dict[str, Any] = {
        "selectors": _values("--selectors", selectors),
        "updates": _values("--updates", updates),
        "targets": _values("--targets", targets),
        "allocations": _values("--allocations", allocations),
        "row_weights": _values("--row-weights", row_weights),
        "reorder": _answers(reorder),
        "sparsity": _shares(sparsity),
        "patterns": _values("--patterns", patterns),
    }
    common = {
        "scope": scope,
        "damping": damping,
        "capture": capture,
        "ignore": tuple(ignore or ()),
        "keep_dense": tuple(keep_dense or ()),
        "held_out": held_out,
        "guard": guard,
        "batch_size": batch_size,
    }
    config = CompareConfig.model_validate({**{k: v for k, v in axes.items() if v}, "seeds": seeds, "common": common})
    windows = [
        CalibrationConfig(source=source, field=field, split=split, samples=samples, sequence_length=sequence_length)
        for source in _sources(calibration)
    ]
    output = output.expanduser()
    show.quiet_libraries()
    try:
        with show.progress(quiet=json) as observer:
            comparison = run(
                options.model_source(model),
                output,
                config,
                windows,
                text=text,
                field=field,
                split=text_split,
                window=window,
                tasks=_values("--tasks", tasks),
                limit=limit,
                device=resolve_device(device),
                observer=observer,
            )
    except KeyboardInterrupt:
        raise _Interrupted(
            f"interrupted; what was finished is in {output}: the same command goes on from there"
        ) from None
    if json:
        print(json_module.dumps({"output": str(output), **comparison.record()}, indent=1, allow_nan=False))
    else:
        plots = ", plots" if any(True for plot in PLOTS for _ in output.glob(plot)) else ""
        print(table(comparison), *comparison.notes, f"written to {output} (comparison.md, .json{plots})", sep="\n")
    if comparison.failures:
        cells = sum(len(row.cells) for row in comparison.rows) + len(comparison.failures)
        raise RunError(
            f"{len(comparison.failures)} of {cells} cells failed (reasons in {output}/comparison.md); "
            "the same command tries them again"
        )


def _values(option: str, given: _Axis) -> tuple[str, ...]:
    """What stands between the commas of all uses of an option."""
    values = tuple(value for part in given or () for value in (v.strip() for v in part.split(",")) if value)
    if given and not values:
        raise InputError(f"{option} names nothing; name some, or leave it out")
    return values


def _sources(given: _Axis) -> tuple[str, ...]:
    """As `_values`, but a file whose name has a comma in it is one."""
    if given and all(Path(part).exists() for part in given):
        return tuple(given)
    return _values("--calibration", given) or ("demo",)


def _shares(given: _Axis) -> tuple[float, ...]:
    values = _values("--sparsity", given)
    try:
        return tuple(float(value) for value in values)
    except ValueError:
        raise InputError(
            f"--sparsity takes numbers such as 0.5,0.6, but it is {','.join(values)!r}; N:M goes to --patterns"
        ) from None


def _answers(given: _Axis) -> tuple[bool, ...]:
    values = _values("--reorder", given)
    if wrong := [value for value in values if value not in ("yes", "no")]:
        raise InputError(f"--reorder takes yes, no or both as yes,no, but it is {wrong[0]!r}")
    return tuple(value == "yes" for value in values)
