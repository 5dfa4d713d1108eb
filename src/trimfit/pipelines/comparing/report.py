"""Writes a comparison as Markdown, JSON and plots."""

import json
import logging
import math
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

from trimfit.evaluate import TaskScore
from trimfit.masks import NM, Pattern
from trimfit.pipelines.comparing.comparison import Cell, Comparison, Row, pattern_name
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.records import LayerRecord
from trimfit.report import Curve, Spread, can_plot, markdown, plot_curves, plot_panels

log = logging.getLogger(__name__)

PLOTS = ("perplexity.png", "layer-error-*.png", "layer-seconds-*.png")
_UPDATES = {"none": "none", "own": "own", "optimal": "optimal refit"}

_Labels: TypeAlias = Mapping[str, Callable[[Row], str]]


def _scope(pattern: Pattern) -> str:
    return "" if isinstance(pattern, NM) else pattern.scope


def _rows(config: PruneConfig) -> str:
    return "" if not config.rows_matter else "attention" if config.weighs_rows else "equal"


# Columns that say what a row is, with the selector's defaults; empty where there is nothing to say. A column beyond the
# first three is shown where what it says differs.
_LABELS: _Labels = {
    "pattern": lambda row: pattern_name(row.config),
    "mask": lambda row: row.config.selector,
    "update": lambda row: _UPDATES[row.config.refit],
    "calibration": lambda row: row.calibration,
    "target": lambda row: row.config.target,
    "scope": lambda row: _scope(row.config.mask_pattern),
    "allocation": lambda row: row.config.split if row.config.pattern is None else "",
    "rows": lambda row: _rows(row.config),
    "order": lambda row: "" if row.config.pattern is None else "reordered" if row.config.reorders else "given",
}
_ALWAYS = ("pattern", "mask", "update")
# Columns of numbers: heading, quantity, format.
_NUMBERS = (
    ("perplexity", "perplexity", ".3f"),
    ("excess nats", "excess_nats", ".4f"),
    ("layer error", "layer_error", ".4f"),
    ("zeros", "zeros", ".1%"),
    ("steps", "steps", ".0f"),
    ("seconds", "seconds", ".1f"),
)
_PIVOTED = (("Perplexity", "perplexity", ".2f"), ("Layer error on held-out tokens", "layer_error", ".4f"))


def write_comparison(comparison: Comparison, out: Path) -> None:
    """`comparison.md`, `comparison.json` and, where matplotlib is installed, the plots, into the folder `out`."""
    for plot in PLOTS:
        for earlier in out.glob(plot):  # of other rows, or of some that fail now
            earlier.unlink()
    _write(out / "comparison.md", report(comparison))
    _write(out / "comparison.json", json.dumps(comparison.record(), indent=1, allow_nan=False) + "\n")
    rows = [row for row in comparison.rows if row.cells]
    if rows and not can_plot():
        log.warning('no plots were drawn, as matplotlib is missing: pip install "trimfit[report]"')
    elif rows:
        _plot_perplexity(comparison, rows, out / "perplexity.png")
        for pattern in dict.fromkeys(pattern_name(row.config) for row in rows):
            own = [row for row in rows if pattern_name(row.config) == pattern]
            name = pattern.replace(":", "-").removesuffix("%")
            _plot_layers(own, out / f"layer-error-{name}.png", f"relative error, {pattern}", lambda r: r.error)
            _plot_layers(own, out / f"layer-seconds-{name}.png", f"seconds, {pattern}", lambda r: r.seconds)


def report(comparison: Comparison) -> str:
    """Markdown: the table, what its numbers are, what is missing, and a row against the patterns where it has some."""
    parts = ["# Pruned models compared", table(comparison), "\n".join(_caption(comparison))]
    notes = [*comparison.notes, *_failures(comparison)]
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    if len({pattern_name(row.config) for row in comparison.rows}) > 1:
        parts += [f"## {title}\n\n{_pivot(comparison, name, form)}" for title, name, form in _PIVOTED]
    return "\n\n".join(parts) + "\n"


def table(comparison: Comparison) -> str:
    """A row for the dense model and for each config, mean ± std over the seeds."""
    labels, dense = _labels(comparison.rows), comparison.dense
    assert dense.score is not None
    numbers = [f"{dense.score.perplexity:.3f}", f"{0:.4f}", *["–"] * (len(_NUMBERS) - 2)]
    numbers += [_accuracy([dense], task.name) for task in dense.tasks]
    lines = [["dense", *[""] * (len(labels) - 1), *numbers, ""]]
    for row in comparison.rows:
        shown = [_text(row.spread(comparison.quantities[name]), form) for _, name, form in _NUMBERS]
        shown += [_accuracy(row.cells, task.name) for task in dense.tasks]
        if not row.cells:
            shown[0] = "failed"
        lines.append([*(of(row) for of in labels.values()), *shown, _count(row)])
    headings = [heading for heading, _, _ in _NUMBERS] + [f"{task.name} ({task.metric})" for task in dense.tasks]
    return markdown([*labels, *headings, "seeds"], lines, left=len(labels))


def _accuracy(cells: Sequence[Cell], name: str) -> str:
    """Mean over the seeds ± the mean standard error over examples."""
    scores = [task for cell in cells for task in cell.tasks if task.name == name]
    if not scores:
        return "–"
    value, error = (statistics.fmean(getattr(s, what) for s in scores) for what in ("value", "standard_error"))
    return Spread(value, error, len(scores)).text(".4f")


def _pivot(comparison: Comparison, quantity: str, form: str) -> str:
    """One quantity: a row for each mask and update, a column for each pattern."""
    labels = {name: of for name, of in _labels(comparison.rows).items() if name != "pattern"}
    patterns = list(dict.fromkeys(pattern_name(row.config) for row in comparison.rows))
    lines: list[tuple[list[str], dict[str, str]]] = []
    for row in comparison.rows:
        key, pattern = [of(row) for of in labels.values()], pattern_name(row.config)
        text = _text(row.spread(comparison.quantities[quantity]), form) if row.cells else "failed"
        # A label that says nothing here, such as an allocation under N:M, is at home in any line.
        at = next((i for i, (own, cells) in enumerate(lines) if pattern not in cells and _agree(own, key)), None)
        if at is None:
            lines.append((key, {pattern: text}))
        else:
            own, cells = lines[at]
            lines[at] = [a or b for a, b in zip(own, key, strict=True)], {**cells, pattern: text}
    body = [[*key, *(cells.get(pattern, "") for pattern in patterns)] for key, cells in lines]
    return markdown([*labels, *patterns], body, left=len(labels))


def _agree(one: Sequence[str], other: Sequence[str]) -> bool:
    return all(not a or not b or a == b for a, b in zip(one, other, strict=True))


def _caption(comparison: Comparison) -> list[str]:
    dense, identity, calibration = comparison.dense.score, comparison.identity, comparison.identity["calibration"]
    assert dense is not None
    versions = ", ".join(f"{name} {version}" for name, version in identity["versions"].items())
    length = calibration["sequence_length"] or "as many as the model's context (at most 2048)"
    return [
        f"Model: {comparison.source} ({identity['model'][:12]}).",
        f"Perplexity on {dense.tokens:,} tokens ({identity['text_name']}), windows of {dense.window}; excess nats: its "
        "logarithm less that of the dense model.",
        f"Pruned on {calibration['samples']} windows of {length} tokens ({calibration['source']}), of which the share "
        f"{comparison.rows[0].config.held_out:g} is held out; a seed draws them: mean ± standard deviation over seeds.",
        "Layer error: ‖X(Ŵ−W)ᵀ‖² / ‖XWᵀ‖² on the held-out windows, mean over layers. Zeros: share in all linear layers "
        "of the blocks. Steps: the most of a layer's solver. Seconds: pruning alone.",
        f"In all cells: {', '.join(_common(comparison.rows))}.",
        *_asked(comparison.dense.tasks),
        f"On {identity['device']}, with {versions}.",
    ]


def _asked(tasks: Sequence[TaskScore]) -> list[str]:
    counts = ", ".join(f"{task.examples:,} of {task.name}" for task in tasks)
    return [f"Tasks: mean over seeds ± standard error over the examples asked, {counts}."] if tasks else []


def _common(rows: Sequence[Row]) -> list[str]:
    """Settings that are the same in all rows and no column tells."""
    told = {"selector", "refit", "sparsity", "pattern", "ignore", "keep_dense", "held_out", "row_weights", "reorder"}
    settings = [row.config.model_dump(exclude={*told, *_LABELS}) for row in rows]
    told_elsewhere = (*_ALWAYS, "calibration")
    resolved = {name: {of(row) for row in rows} - {""} for name, of in _LABELS.items() if name not in told_elsewhere}
    return [f"{name} {min(values)}" for name, values in resolved.items() if len(values) == 1] + [
        f"{name.replace('_', ' ')} {value}"
        for name, value in settings[0].items()
        if all(other[name] == value for other in settings)
    ]


def _failures(comparison: Comparison) -> list[str]:
    labels = _labels(comparison.rows).values()
    return [
        f"Failed: {', '.join(of(row) for of in labels)}, seed {cell.seed}: {cell.failure}"
        for row in comparison.rows
        for cell in row.failures
    ]


def _labels(rows: Sequence[Row]) -> _Labels:
    return {name: of for name, of in _LABELS.items() if name in _ALWAYS or len({of(row) for row in rows} - {""}) > 1}


def _count(row: Row) -> str:
    return f"{len(row.cells)} of {len(row.cells) + len(row.failures)}" if row.failures else str(len(row.cells))


def _text(spread: Spread | None, form: str) -> str:
    if spread is None:
        return "–"
    return f"{spread.mean:{form}}" if form in (".1%", ".0f") else spread.text(form)  # shares and counts hardly vary


def _plot_perplexity(comparison: Comparison, rows: Sequence[Row], path: Path) -> None:
    labels, dense = _labels(rows), comparison.dense.score
    assert dense is not None
    names = list(dict.fromkeys(row.config.pattern for row in rows if row.config.pattern is not None))
    series: dict[tuple[str, str, bool], list[tuple[float, Spread]]] = {}
    for row in rows:
        sparsity, pattern = row.config.sparsity, row.config.pattern
        perplexity = row.spread(comparison.quantities["perplexity"])
        assert perplexity is not None
        place = names.index(pattern) if pattern is not None else 100 * (sparsity or 0)
        series.setdefault((*_look(row, labels), pattern is None), []).append((place, perplexity))
    curves, points = (
        [_curve(hue, style, own, joined=free) for (hue, style, free), own in series.items() if free == side]
        for side in (True, False)
    )
    level = f"dense {dense.perplexity:.2f}", dense.perplexity
    plot_curves(path, curves, points, names, x="sparsity, %", y="perplexity", level=level)


def _plot_layers(rows: Sequence[Row], path: Path, label: str, quantity: Callable[[LayerRecord], float]) -> None:
    """A panel for each kind of layer, the blocks along the abscissa, means over the seeds."""
    labels = _labels(rows)
    panels: dict[str, list[Curve]] = {}
    for row in rows:
        values: dict[str, dict[int, list[float]]] = {}
        for record in (record for cell in row.cells if cell.report for record in cell.report.layers):
            kind = record.name.split(f".{record.block}.", 1)[-1]
            values.setdefault(kind, {}).setdefault(record.block, []).append(quantity(record))
        for kind, blocks in values.items():
            points = [(float(block), spread) for block, own in blocks.items() if (spread := Spread.of(own))]
            panels.setdefault(kind, []).append(_curve(*_look(row, labels), points))
    plot_panels(path, panels, x="block", y=label)


def _look(row: Row, labels: _Labels) -> tuple[str, str]:
    """What the colour stands for, and what the dashes do: all labels but the pattern."""
    mask, *others = (of(row) for name, of in labels.items() if name != "pattern")
    return mask, ", ".join(others)


def _curve(hue: str, style: str, points: Sequence[tuple[float, Spread]], *, joined: bool = True) -> Curve:
    points = sorted((point for point in points if math.isfinite(point[1].mean)), key=lambda point: point[0])
    return Curve(
        hue, style, [x for x, _ in points], [s.mean for _, s in points], [s.std or 0 for _, s in points], joined
    )


def _write(path: Path, text: str) -> None:
    """All or nothing."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
