"""The commands. Heavy imports wait until a command runs, so that help and errors are quick."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pydantic import ByteSize, TypeAdapter

from trimfit.cli import options
from trimfit.errors import InputError

if TYPE_CHECKING:
    from pydantic import BaseModel

    from trimfit.calibration import CalibrationConfig
    from trimfit.pipelines import PruneConfig, QuantizeConfig
    from trimfit.pipelines.quantizing.save import Format


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", help="Where to write the pruned model.")] = Path(
        "trimfit-demo"
    ),
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Prune the embedded model in several ways and compare; needs no network and no data."""
    from trimfit.checkpoints import resolve_device
    from trimfit.cli import show
    from trimfit.demo.run import run_demo

    output = output.expanduser()
    show.quiet_libraries()
    with show.progress(quiet=json) as observer:
        rows = list(run_demo(output, observer, resolve_device(device)))
    show.demo(rows, output, as_json=json)


def prune(
    model: options.Model,
    output: options.Output,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of weights to remove, 0 ≤ s < 1. \\[default: 0.5]")
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="N:M instead of a sparsity: N kept of each M inputs.")] = None,
    selector: Annotated[str, typer.Option(help="magnitude, wanda, sparsegpt, thanos or joint.")] = "joint",
    scope: options.Scope = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            help="How layers share the sparsity: uniform, owl (by outliers) or error (by cost). "
            "\\[default: error for joint, else uniform]"
        ),
    ] = None,
    row_weights: Annotated[
        str | None,
        typer.Option(
            help="What errors of Q and K count: equal, or by what attention makes of them, rows of a head together. "
            "\\[default: attention for joint]"
        ),
    ] = None,
    reorder: Annotated[
        bool | None,
        typer.Option(
            help="Put hidden units and dimensions of V in an order that suits N:M. \\[default: reorder for joint]"
        ),
    ] = None,
    refit: Annotated[str, typer.Option(help="optimal, own (the selector's update) or none.")] = "optimal",
    target: Annotated[
        str, typer.Option(help="What to reproduce: dense (the dense model's activations) or layer (the layer's own).")
    ] = "dense",
    dense_share: Annotated[float, typer.Option(help="With the target dense: how far to go, 0 < s ≤ 1.")] = 0.5,
    solver: Annotated[
        str, typer.Option(help="auto, cholesky, cg or cg-diagonal; rows of Q and K together: always cg.")
    ] = "auto",
    tolerance: Annotated[float, typer.Option(help="Relative gap at which a row is finished.")] = 1e-4,
    damping: options.Damping = "0.01",
    capture: options.Capture = "group",
    ignore: options.Ignore = None,
    keep_dense: options.KeepDense = None,
    held_out: options.HeldOut = 0.125,
    guard: Annotated[
        bool, typer.Option(help="Give a layer simpler weights where the refit is worse on held-out windows.")
    ] = True,
    calibration: options.Calibration = "demo",
    field: options.Field = "text",
    split: options.Split = "train",
    samples: options.Samples = 128,
    own_samples: options.OwnSamples = 0,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 8,
    offload: options.Offload = False,
    memory_limit: options.MemoryLimit = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    plan: options.Plan = False,
    json: options.Json = False,
) -> None:
    """Prune MODEL and refit what is left to the certified optimum."""
    given = dict(locals())
    if plan:
        from trimfit.cli.plan import plan_prune

        plan_prune(given)
        return
    from trimfit.checkpoints import resolve_device
    from trimfit.cli import show
    from trimfit.pipelines import prune_checkpoint
    from trimfit.ranks import joined, local_device

    config, windows = prune_configs(given)
    output = output.expanduser()
    show.quiet_libraries()
    here = local_device(resolve_device(device))
    with joined(here) as ranks, show.progress(quiet=json or not ranks.is_first) as observer:
        report = prune_checkpoint(
            options.model_source(model),
            output,
            config,
            windows,
            device=here,
            overwrite=overwrite,
            offload=offload,
            memory_limit=size(memory_limit),
            ranks=ranks,
            observer=observer,
        )
    if ranks.is_first:
        show.prune(report, windows, output, as_json=json)


def prune_configs(given: dict[str, Any]) -> tuple["PruneConfig", "CalibrationConfig"]:
    """From the options of `prune`, by their names."""
    from trimfit.calibration import CalibrationConfig
    from trimfit.pipelines import PruneConfig

    asked = {name: given[name] for name in PruneConfig.model_fields}
    asked |= {name: tuple(given[name] or ()) for name in ("ignore", "keep_dense")}
    drawn = {name: given[name] for name in CalibrationConfig.model_fields if name != "source"}
    return PruneConfig.model_validate(asked), CalibrationConfig(source=given["calibration"], **drawn)


def quantize(
    model: options.Model,
    output: options.Output,
    bits: Annotated[int, typer.Option(help="2 to 8.")] = 4,
    group_size: Annotated[str, typer.Option(help="Inputs that share a scale: 128, 64, 32, … or channel.")] = "128",
    symmetric: Annotated[bool, typer.Option("--symmetric", help="No zero points.")] = False,
    transform: Annotated[
        str,
        typer.Option(
            help="none; pairs (V/O); free (pairs and column balance, no cost at inference); online (block-diagonal, "
            "run by trimfit.load only); paper (V/O by gradients)."
        ),
    ] = "free",
    rounding: Annotated[
        str, typer.Option(help="alternating (error feedback; V and O in turns) or nearest.")
    ] = "alternating",
    block_size: Annotated[int, typer.Option(help="Of online transformations, at most 128.")] = 128,
    learned_steps: Annotated[
        int, typer.Option(help="Of gradient descent for online transformations; 0: closed forms only.")
    ] = 100,
    damping: Annotated[
        float | None, typer.Option(help="λ in H + λ·mean(diag H)·I. \\[default: 0.01 with calibration, 0.5 without]")
    ] = None,
    ignore: options.Ignore = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="self (text that MODEL writes itself), text file, .jsonl, .npy/.safetensors of ids, hub data set, or "
            "'demo'. \\[default: no data, no forward pass]"
        ),
    ] = None,
    field: options.Field = "text",
    split: options.Split = "train",
    samples: options.Samples = 128,
    own_samples: options.OwnSamples = 0,
    sequence_length: options.SequenceLength = None,
    seed: options.Seed = 0,
    batch_size: options.BatchSize = 8,
    format: Annotated[
        str, typer.Option(help="packed (compressed-tensors, for transformers and vLLM), dense, or gguf.")
    ] = "packed",
    offload: options.Offload = False,
    memory_limit: options.MemoryLimit = None,
    device: options.Device = "auto",
    overwrite: options.Overwrite = False,
    plan: options.Plan = False,
    json: options.Json = False,
) -> None:
    """Quantize MODEL's weights; asks for no data unless --calibration is given."""
    given = dict(locals())
    if plan:
        from trimfit.cli.plan import plan_quantize

        plan_quantize(given)
        return
    from trimfit.checkpoints import resolve_device
    from trimfit.cli import show
    from trimfit.pipelines import quantize_checkpoint
    from trimfit.ranks import joined, local_device

    config, windows, checked = quantize_configs(given)
    output = output.expanduser()
    show.quiet_libraries()
    here = local_device(resolve_device(device))
    with joined(here) as ranks, show.progress(quiet=json or not ranks.is_first) as observer:
        report = quantize_checkpoint(
            options.model_source(model),
            output,
            config,
            windows,
            format=checked,
            device=here,
            overwrite=overwrite,
            offload=offload,
            memory_limit=size(memory_limit),
            ranks=ranks,
            observer=observer,
        )
    if ranks.is_first:
        show.quantize(report, windows, checked, output, as_json=json)


def quantize_configs(given: dict[str, Any]) -> tuple["QuantizeConfig", "CalibrationConfig | None", "Format"]:
    """From the options of `quantize`, by their names; None where no data is asked for."""
    from trimfit.calibration import CalibrationConfig
    from trimfit.pipelines import QuantizeConfig, check_format

    asked = {name: given[name] for name in QuantizeConfig.model_fields} | {"ignore": tuple(given["ignore"] or ())}
    config = QuantizeConfig.model_validate(asked)
    checked = check_format(given["format"], config)
    if config.transform != "online":
        _refuse_unused(given, QuantizeConfig, ["block_size", "learned_steps"], "--transform online")
    of_data = [name for name in CalibrationConfig.model_fields if name != "source"]
    if given["calibration"] is None:
        _refuse_unused(given, CalibrationConfig, of_data, "--calibration")
        if given["memory_limit"] is not None:
            raise InputError(_unused("memory_limit", "--calibration"))
        return config, None, checked
    drawn = {name: given[name] for name in of_data}
    return config, CalibrationConfig(source=given["calibration"], **drawn), checked


def _refuse_unused(given: dict[str, Any], config: type["BaseModel"], names: list[str], need: str) -> None:
    """Raises `InputError` for an option that is not what it is by default, but does nothing without another."""
    for name in names:
        if given[name] != config.model_fields[name].default:
            raise InputError(_unused(name, need))


def _unused(name: str, need: str) -> str:
    option = f"--{name.replace('_', '-')}"
    return f"{option} does nothing without {need}: give that too, or leave out {option}"


def evaluate(
    model: options.Model,
    text: Annotated[
        str | None,
        typer.Option(help="Text to predict: a file, .jsonl, hub data set, or 'demo'. Or give --tasks."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks, with commas between: 'demo' or continuation:TEXT (which of four continues a passage?), names "
            'of lm-eval, task files or directories. Needs pip install "trimfit\\[eval]".'
        ),
    ] = None,
    field: options.Field = "text",
    split: options.Split = "test",
    window: options.Window = None,
    limit: options.Limit = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in one forward pass, for tasks.")] = 16,
    seed: Annotated[int, typer.Option(help="Of few-shot examples.")] = 0,
    device: options.Device = "auto",
    json: options.Json = False,
) -> None:
    """Perplexity and bits per byte of MODEL on a text; accuracy on tasks."""
    from trimfit.checkpoints import resolve_device
    from trimfit.cli import show
    from trimfit.pipelines.evaluate_checkpoint import evaluate_checkpoint

    show.quiet_libraries()
    with show.progress(quiet=json) as observer:
        evaluation = evaluate_checkpoint(
            options.model_source(model),
            text=text,
            field=field,
            split=split,
            window=window,
            tasks=[task.strip() for task in (tasks or "").split(",") if task.strip()],
            batch_size=batch_size,
            seed=seed,
            limit=limit,
            device=resolve_device(device),
            observer=observer,
        )
    show.evaluation(evaluation, text, as_json=json)


def size(text: str | None) -> int | None:
    """Bytes in a size such as 8GiB."""
    if text is None:
        return None
    try:
        if text.strip().isdigit():
            raise ValueError("bytes are hardly meant")
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValueError:
        raise InputError(f"--memory-limit takes a size such as 8GiB or 500MB, but it is {text!r}") from None
