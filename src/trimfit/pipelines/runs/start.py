"""What every run does before it works: its output is checked, its directory entered, its identity told."""

import json
import logging
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import BaseModel

from trimfit.checkpoints import SIDECAR, check_output
from trimfit.errors import InputError
from trimfit.pipelines.environment import versions
from trimfit.pipelines.runs.directory import REQUEST, RunDirectory, check_run_path, run_path
from trimfit.ranks import Ranks

log = logging.getLogger(__name__)
_Report = TypeVar("_Report", bound=BaseModel)


def take_finished(out: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The record in `out`, when a run that was asked for the same wrote it and was killed before it had cleaned up.

    The directory of such a run is removed, whatever it was asked for.
    """
    try:
        asked = json.loads((run_path(out) / REQUEST).read_text(encoding="utf-8"))
        record = json.loads((out / SIDECAR).read_text(encoding="utf-8"))
        if record["run"] != asked["run"]:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    with RunDirectory(out, {}):  # which removes it, under its lock
        pass
    return record if json.loads(json.dumps(request)).items() <= asked.items() else None


def report_in(record: Mapping[str, Any], kind: type[_Report]) -> _Report:
    """The report of a run, from the record of its output."""
    return kind.model_validate({name: record[name] for name in kind.model_fields})


def enter_run(stack: ExitStack, source: str, out: Path, overwrite: bool, request: Mapping[str, Any]) -> RunDirectory:
    """The run directory, when `out` can be written."""
    check_target(source, out, overwrite)
    local = Path(source).expanduser().is_dir()
    run = stack.enter_context(RunDirectory(out, {**request, "local": local}))
    check_target(source, out, overwrite)  # an old output that a killed run had moved is back
    return run


@contextmanager
def threads_of(run: RunDirectory | None, ranks: Ranks) -> Generator[None]:
    """With as many threads as the run began with: others sum in another order, and masks would come out otherwise."""
    before, began = torch.get_num_threads(), ranks.first(lambda: there(run).threads)
    if began != before:
        log.warning("computing with %d threads, as the run began with, in place of %d", began, before)
    torch.set_num_threads(began)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_target(source: str, out: Path, overwrite: bool) -> None:
    """Raises `InputError` when a run may not write `out`, as far as that can be told before it begins."""
    if overwrite:
        check_source_stays(source, out)
    check_output(out, overwrite)
    check_run_path(out)


def there(run: RunDirectory | None) -> RunDirectory:
    """The run directory in the first process, which alone asks."""
    assert run is not None
    return run


def check_same_model(source: str, fingerprint: str, ranks: Ranks) -> None:
    """Raises `InputError` when the processes have loaded different models."""
    if ranks.first(lambda: fingerprint) != fingerprint:
        raise InputError(f"the weights of {source} are not the same for all processes; copy the model again")


def identity(command: str, model_fingerprint: str, **parts: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for a run to go on, name by name: `parts` and the versions of all that computes."""
    flat = {
        f"{part}.{name}": v for part, values in (parts | {"version": versions()}).items() for name, v in values.items()
    }
    return {"command": command, "model": model_fingerprint, **flat}


def check_source_stays(source: str, out: Path) -> None:
    """`out` replaces all that lies there: never the model itself, or a folder around it."""
    model = Path(source).expanduser().resolve()
    if model.is_dir() and model.is_relative_to(out.resolve()):
        raise InputError(f"writing {out} would destroy the model {source} itself; choose another output")
