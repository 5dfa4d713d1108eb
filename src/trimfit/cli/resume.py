"""The command that goes on with an interrupted one."""

from pathlib import Path
from typing import Annotated

import typer

from trimfit.cli import options


def resume(
    directory: Annotated[Path, typer.Argument(help="Output of the run that was interrupted.")],
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, … \\[default: that of the run]")] = None,
    json: options.Json = False,
) -> None:
    """Go on with a prune or quantize that was interrupted or killed, from the last layers that were finished."""
    from trimfit.checkpoints import resolve_device
    from trimfit.cli import show
    from trimfit.pipelines import PruneReport
    from trimfit.pipelines import resume as go_on
    from trimfit.ranks import joined, local_device

    here = None if device is None else local_device(resolve_device(device))
    show.quiet_libraries()
    with joined(here or local_device(resolve_device("auto"))) as ranks:
        with show.progress(quiet=json or not ranks.is_first) as observer:
            finished = go_on(directory.expanduser(), device=here, ranks=ranks, observer=observer)
        if not ranks.is_first:
            return
        data = finished.calibration
        if isinstance(finished.report, PruneReport):
            assert data is not None
            show.prune(finished.report, data, finished.out, as_json=json)
        else:
            show.quantize(finished.report, data, finished.file_format, finished.out, as_json=json)
