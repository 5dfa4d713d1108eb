"""Runs a grid of prune configs over several draws of the calibration windows, and scores every pruned model."""

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from trimfit.calibration import CalibrationConfig, read_documents, window_length
from trimfit.calibration.standard_library import EVALUATION, read_modules
from trimfit.checkpoints import load_checkpoint
from trimfit.errors import InputError
from trimfit.evaluate import Tasks, check_limit
from trimfit.masks import parse_pattern
from trimfit.models import Block, find_blocks, select_layers
from trimfit.pipelines.comparing.bench import Bench
from trimfit.pipelines.comparing.comparison import Cell, Comparison, make_rows
from trimfit.pipelines.comparing.config import CompareConfig
from trimfit.pipelines.comparing.report import write_comparison
from trimfit.pipelines.observer import Observer, Silent
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.damping import check_damping
from trimfit.pipelines.runs.journal import Journal

JOURNAL = "journal.jsonl"


@torch.inference_mode(False)  # what is loaded in it no gradient could be taken through
def compare(
    source: str,
    out: str | Path,
    config: CompareConfig | None = None,
    calibration: CalibrationConfig | Sequence[CalibrationConfig] | None = None,
    *,
    text: str = "demo",
    field: str = "text",
    split: str = "test",
    window: int | None = None,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    device: torch.device | None = None,
    observer: Observer | None = None,
) -> Comparison:
    """Prunes `source` in every way of a grid, each time from the dense model, and compares what is left.

    **Arguments**

    - `source`: model directory or hub name.
    - `out`: folder for `journal.jsonl`, to which each finished cell goes at once, and at the end for `comparison.md`,
      `comparison.json` and, with matplotlib, plots. With the journal of an interrupted run in it, finished cells are
      taken from there; more axes or seeds than before may be asked for. Cells that failed are tried again.
    - `config`, `calibration`: the grid; and the windows, whose seeds are `calibration.seed` and those after it. Several
      that differ in their source alone are an axis too: each config is pruned on windows of each.
    - `text`, `field`, `split`, `window`: what is scored, as for `trimfit eval`; `tasks`: as for `evaluate_tasks`.
    - `limit`: the most windows of the text, and the most examples of each task.
    - `device`, `observer`: where to work (the CPU when None), and who is told of the progress.

    **Returns** a `Comparison`. A cell that fails is marked there and logged, and the others go on. Raises `InputError`
    for a grid without cells, an `out` with something else in it or with the journal of another model, calibration,
    text, or version, and for whatever is wrong with model and data before the first cell.
    """
    config, observer = config or CompareConfig(), observer or Silent()
    calibrations = _sources(CalibrationConfig() if calibration is None else calibration)
    calibration = calibrations[0]
    grid, out = config.grid(), Path(out)
    _check_out(out)
    check_limit(limit)
    check_damping(config.settings.damping, config.settings.held_out, calibration.count)
    asked = Tasks(tasks) if tasks else None  # before the model, so that a mistyped name is told at once
    documents = read_modules(EVALUATION) if text == "demo" else read_documents(text, field=field, split=split)
    observer.stage(f"loading {source}")
    checkpoint = load_checkpoint(source, device)
    blocks = select_layers(checkpoint.model, find_blocks(checkpoint.model), config.settings.ignore)
    losing = select_layers(checkpoint.model, blocks, config.settings.keep_dense, "keep-dense")
    fitted = _Fitted(grid.configs, losing)
    bench = Bench(
        checkpoint,
        calibrations,
        documents,
        window=window_length(window, checkpoint.model.config),
        tasks=asked,
        limit=limit,
        batch_size=config.settings.batch_size,
        observer=observer,
    )
    identity = bench.identity()
    with Journal(out / JOURNAL) as journal:
        recorded = _cells(journal, identity)
        seeds = range(calibration.seed, calibration.seed + config.seeds)
        sources = [one.source for one in calibrations]
        dense, cells = _run(bench, journal, recorded, list(itertools.product(sources, seeds, fitted.configs)))
        comparison = Comparison(
            source=source,
            identity={"text_name": text, **identity},
            dense=dense,
            rows=make_rows(fitted.configs, sources, cells),
            weights=sum(layer.weight.numel() for block in find_blocks(checkpoint.model) for layer in block.layers),
            notes=(*fitted.notes, *(f"Left out: {reason}." for reason in grid.left_out)),
        )
        observer.stage(f"writing {out}")
        write_comparison(comparison, out)
    return comparison


def _run(
    bench: Bench, journal: Journal, recorded: Sequence[Cell], wanted: Sequence[tuple[str, int, PruneConfig]]
) -> tuple[Cell, list[Cell]]:
    """The dense cell and those wanted, in that order, from the journal where they are finished there."""
    done = {(cell.calibration, cell.seed, cell.config): cell for cell in recorded if cell.failure is None}
    dense = done.get((None, None, None))
    if dense is None:
        dense = bench.dense()
        journal.append(dense.record())
    cells: list[Cell] = []
    for number, (source, seed, config) in enumerate(wanted, start=1):
        cell = done.get((source, seed, config))
        if cell is None:
            cell = bench.cell(config, source, seed, f"{number}/{len(wanted)}")
            journal.append(cell.record())
        cells.append(cell)
    return dense, cells


def _cells(journal: Journal, identity: Mapping[str, Any]) -> list[Cell]:
    """Those that are in the journal."""
    try:
        # Nothing is lost with a journal without cells, such as that of a task whose name was mistyped.
        return [Cell.model_validate(record) for record in journal.open(identity, replace_empty=True)]
    except ValidationError as error:
        first = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise InputError(
            f"the cells of {journal.path} are of another trimfit, from {first} on; choose another output"
        ) from error


def _sources(calibration: CalibrationConfig | Sequence[CalibrationConfig]) -> list[CalibrationConfig]:
    """One for each source."""
    given = [calibration] if isinstance(calibration, CalibrationConfig) else list(calibration)
    by_source = {one.source: one for one in given}
    if not by_source:
        raise InputError("no calibration is given; name a source, or leave it out for the default")
    first = given[0]
    if any(one.model_copy(update={"source": first.source}) != first for one in given):
        raise InputError("several calibrations of one comparison may differ in their source only")
    return list(by_source.values())


def _check_out(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file, not a directory; choose another output")
    if out.exists() and any(out.iterdir()) and not (out / JOURNAL).is_file():
        raise InputError(f"{out} has other things in it than a comparison; choose another output")


class _Fitted:
    """Configs made fit for a model: layers whose width an N:M pattern does not divide are kept dense.

    `losing` are the blocks with the layers that lose weights. Raises `InputError` when no config is left.
    """

    def __init__(self, configs: Sequence[PruneConfig], losing: Sequence[Block]):
        self._losing = losing
        self._notes: dict[str, None] = {}
        self.configs = tuple(fitted for config in configs if (fitted := self._fit(config)) is not None)
        self.notes = tuple(self._notes)
        if not self.configs:
            raise InputError(f"no layer can be pruned as asked: {' '.join(self.notes)}")

    def _fit(self, config: PruneConfig) -> PruneConfig | None:
        if config.pattern is None:
            return config
        m = parse_pattern(config.pattern).m
        layers = [(block, layer) for block in self._losing for layer in block.layers]
        dense = [(block, layer) for block, layer in layers if layer.weight.shape[1] % m]
        if not dense:
            return config
        kinds = Counter(layer.name.removeprefix(f"{block.name}.") for block, layer in dense)
        named = ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
        if len(dense) == len(layers):
            self._notes[f"Left out: {config.pattern}, as {m} divides the width of no layer to prune."] = None
            return None
        self._notes[f"{config.pattern}: layers whose width {m} does not divide lose no weights: {named}."] = None
        return config.model_copy(update={"keep_dense": (*config.keep_dense, *(layer.name for _, layer in dense))})
