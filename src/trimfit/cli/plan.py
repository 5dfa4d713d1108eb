"""`--plan` of `trimfit prune` and `trimfit quantize`, and `trimfit plan`, which is that of prune."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from trimfit.cli import commands
from trimfit.cli.options import model_source
from trimfit.errors import InputError

if TYPE_CHECKING:
    from trimfit.pipelines.planning.plan import Plan, Target

_SMALL = 1_000_000  # weights: docs/scale.md

_Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Directory that would be written. \\[default: one in the working directory]"),
]


def plan(**given: Any) -> None:
    """Say what pruning MODEL would take, as prune --plan does: layers, time, memory and disk. Loads no weights."""
    plan_prune(given)


def plan_prune(given: dict[str, Any]) -> None:
    """Prints the plan of `trimfit prune` with these options."""
    from trimfit.pipelines.planning import plan

    config, calibration = commands.prune_configs(given)
    target = _target(given)
    planned = plan.plan_prune(model_source(given["model"]), config, calibration, target)
    _say(planned, calibration.written, given["json"])


def plan_quantize(given: dict[str, Any]) -> None:
    """Prints the plan of `trimfit quantize` with these options."""
    from trimfit.pipelines.planning import plan

    config, calibration, checked = commands.quantize_configs(given)
    target = _target(given)
    planned = plan.plan_quantize(model_source(given["model"]), config, calibration, checked, target)
    _say(planned, calibration.written if calibration else 0, given["json"])


def _target(given: dict[str, Any]) -> "Target":
    from trimfit.checkpoints import resolve_device
    from trimfit.cli import show
    from trimfit.pipelines.planning.plan import Target
    from trimfit.ranks import launched

    if launched():
        raise InputError("a plan is made by one process: start it without torchrun")
    show.quiet_libraries()
    return Target(
        None if given["output"] is None else given["output"].expanduser(),
        resolve_device(given["device"]),
        given["overwrite"],
        given["offload"],
        commands.size(given["memory_limit"]),
    )


def _say(planned: "Plan", written: int, as_json: bool) -> None:
    from trimfit.pipelines.planning.plan import check_fits

    if as_json:
        print(planned.model_dump_json(indent=1))
    else:
        _print(planned, written)
    check_fits(planned)


def _like_prune() -> inspect.Signature:
    """The same options with the same defaults, but for the output, which need not be told."""
    hints = get_type_hints(commands.prune, include_extras=True) | {"output": _Output}
    parameters = [
        one.replace(annotation=hints[name], default=None if name == "output" else one.default)
        for name, one in inspect.signature(commands.prune).parameters.items()
        if name != "plan"
    ]
    plan.__annotations__ = {one.name: one.annotation for one in parameters}
    return inspect.Signature(sorted(parameters, key=lambda one: one.default is not one.empty))


plan.__signature__ = _like_prune()  # type: ignore[attr-defined]  # where Typer looks


def _print(plan: "Plan", written: int) -> None:
    from rich.console import Console

    from trimfit.cli import show

    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{plan.layers} layers in {plan.blocks} blocks, with {plan.weights / 1e9:.3g} of "
        f"{plan.parameters / 1e9:.3g} billion weights ({plan.model_bytes / 2**30:.2f} GiB in all); "
        + (f"{plan.windows} windows of {plan.window_length} tokens" if plan.windows else "no data")
        + f" on {plan.device}"
        + (", one block at a time" if plan.offload else "")
    )
    table = show.empty_table("stage", "memory, GiB", "on the device, GiB")
    for peak in plan.peaks:
        table.add_row(peak.stage, f"{peak.host / 2**30:.2f}", f"{peak.device / 2**30:.2f}" if peak.device else "–")
    there = f"{plan.device_total / 2**30:.2f}" if plan.device_total else "–"
    table.add_row("there is", f"{plan.host_total / 2**30:.2f}", there)
    console.print(table, "")
    table = show.empty_table("stage", "seconds")
    for stage, seconds in plan.seconds.items():
        table.add_row(stage, f"{seconds:.1f}")
    table.add_row("together", f"{sum(plan.seconds.values()):.1f}")
    console.print(table, "")
    rates = plan.throughput
    console.print(
        f"measured here: {rates.model / 1e9:.0f} Gflop/s in the model's dtype, {rates.float32 / 1e9:.0f} in float32, "
        f"{rates.float64 / 1e9:.0f} in float64; memory {rates.memory / 1e9:.1f} GB/s, files {rates.disk / 1e9:.1f} "
        f"GB/s; {rates.calls / 1e3:.0f} thousand small operations/s"
    )
    if written:
        console.print(
            f"not counted: writing {written} windows, a pass through the whole model for each of their tokens"
        )
    if plan.weights < _SMALL:
        console.print("so small a model takes several times as long, in calls that are not counted")
    console.print(f"disk: {plan.disk / 2**30:.2f} GiB with the output, {plan.disk_free / 2**30:.1f} GiB free")
