"""`trimfit plan`: the options of `trimfit prune`, and what they would take."""

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from trimfit.cli import commands
from trimfit.cli.options import model_source

if TYPE_CHECKING:
    from trimfit.pipelines.plan import Plan

_Output = Annotated[
    Path, typer.Option("-o", "--output", help="Where the output would be written: its disk must have the space.")
]


def plan(**given: Any) -> None:
    """Say what pruning MODEL would take: layers, time, memory and disk. Loads no weights; the options are prune's."""
    from trimfit.checkpoints import resolve_device
    from trimfit.cli import show
    from trimfit.pipelines.plan import check_fits, plan_checkpoint

    show.quiet_libraries()
    config, calibration = commands.prune_configs(given)
    planned = plan_checkpoint(
        model_source(given["model"]),
        given["output"].expanduser(),
        config,
        calibration,
        device=resolve_device(given["device"]),
        offload=given["offload"],
        memory_limit=commands.size(given["memory_limit"]),
    )
    if given["json"]:
        print(planned.model_dump_json(indent=1))
    else:
        _print(planned)
    check_fits(planned)


def _like_prune() -> inspect.Signature:
    """The same options with the same defaults, but for the output, which need not be told."""
    hints = get_type_hints(commands.prune, include_extras=True) | {"output": _Output}
    parameters = [
        one.replace(annotation=hints[name], default=Path() if name == "output" else one.default)
        for name, one in inspect.signature(commands.prune).parameters.items()
        if name != "overwrite"
    ]
    plan.__annotations__ = {one.name: one.annotation for one in parameters}
    return inspect.Signature(sorted(parameters, key=lambda one: one.default is not one.empty))


plan.__signature__ = _like_prune()  # type: ignore[attr-defined]  # where Typer looks


def _print(plan: "Plan") -> None:
    from rich.console import Console

    from trimfit.cli import show

    console = Console(markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{plan.layers} layers in {plan.blocks} blocks, {plan.weights / 1e9:.3g} billion weights to prune of "
        f"{plan.parameters / 1e9:.3g} billion ({plan.model_bytes / 2**30:.2f} GiB); "
        f"{plan.windows} windows of {plan.window_length} tokens on {plan.device}"
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
        f"{rates.float64 / 1e9:.0f} in float64; memory {rates.memory / 1e9:.1f} GB/s, files {rates.disk / 1e9:.1f} GB/s"
    )
    console.print(f"disk: {plan.disk / 2**30:.2f} GiB beside the output, {plan.disk_free / 2**30:.1f} GiB free")
