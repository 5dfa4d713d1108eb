"""What the commands print: progress while they run, tables or JSON when they are done."""

import json
import math
import sys
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from trimfit.calibration.config import DEMO, CalibrationConfig
from trimfit.demo.run import PROMPT, DemoRow
from trimfit.evaluate import Score
from trimfit.pipelines import Finished, LayerRecord, Observer, PruneReport, QuantizedRecord, QuantizeReport
from trimfit.pipelines.evaluate_checkpoint import Evaluation
from trimfit.pipelines.pruning.damping import DEFAULT_DAMPING

_PLENTY = 16  # tokens for each input from which damping auto gained little: docs/choosing.md


def quiet_libraries() -> None:
    """Silences the progress bars and notes of the libraries underneath; trimfit shows its own."""
    from huggingface_hub.utils import logging as hub
    from transformers.utils import logging

    _hide_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub.set_verbosity_error()  # it tells of each attempt to reach the hub
    warnings.filterwarnings("ignore")


@cache
def _hide_bars() -> None:
    """All of tqdm's, once and for all: compressed-tensors has no switch for its own."""
    from tqdm import tqdm

    bar: Any = tqdm
    show = bar.__init__

    def hide(self: Any, *arguments: Any, **options: Any) -> None:
        show(self, *arguments, **options | {"disable": True})

    bar.__init__ = hide


@contextmanager
def progress(*, quiet: bool) -> Generator[Observer]:
    """A bar on standard error with the stage, the running error and the time left; silent away from a terminal."""
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=12),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=Console(stderr=True),
        transient=True,
        disable=quiet or not sys.stderr.isatty(),  # rich would take FORCE_COLOR for a terminal
    )
    with bar:
        yield _Bar(bar, bar.add_task("", total=None, note=""))


class _Bar:
    """Observer that moves a progress bar."""

    def __init__(self, bar: Progress, task: TaskID):
        self._bar, self._task = bar, task
        self._errors: list[float] = []

    def stage(self, text: str) -> None:
        """Shows the stage."""
        self._bar.update(self._task, description=text)

    def layer(self, record: Finished, done: float) -> None:
        """Moves the bar; the note is the layer and the mean error of the layers so far."""
        self._errors.append(record.error)
        mean = sum(self._errors) / len(self._errors)
        name = record.name.split(f".{record.block}.", 1)[-1]  # the stage tells the block
        self._bar.update(self._task, total=1.0, completed=done, note=f"{name}  error {mean:.4f}")
        if done >= 1:
            self._errors.clear()
            self._bar.reset(self._task)


def prune(report: PruneReport, calibration: CalibrationConfig, out: Path, *, as_json: bool) -> None:
    """Summary of a prune run."""
    if as_json:
        _print_json({"output": str(out), **report.model_dump()})
        return
    table = empty_table("", "masked", "final", "as stored")
    for label, which in (("calibration", "calibration"), ("held-out", "held_out")):
        values = [getattr(report.mean_error(stage), which) for stage in ("masked", "final", "stored")]
        table.add_row(f"mean layer error, {label}", *(_number(v, ".4f") for v in values))
    console = Console(markup=False)
    console.print(table, "")
    config = report.config
    tokens = report.windows * report.window_length
    kept = sum(not record.sparsity for record in report.layers) if config.keep_dense else 0
    console.print(
        f"{len(report.layers)} layers{f', {kept} of them kept dense,' if kept else ''} pruned to "
        f"{report.sparsity:.2%} zeros with {config.selector} "
        f"({config.pattern or f'sparsity {config.mask_pattern.sparsity:g}'}), refit {config.refit}; "
        f"{tokens:,} calibration tokens ({_data(calibration)}), {report.held_out_windows} windows held out"
    )
    if report.certificate is not None:
        unfinished = sum(record.status not in (None, "optimal") for record in report.layers)
        refitted = sum(record.certificate is not None for record in report.layers)
        which = "every layer" if refitted == len(report.layers) else f"each of the {refitted} refitted layers"
        console.print(
            f"certificate: before rounding to the model's dtype, {which} is proven within {report.certificate:.1e} "
            f"of its optimum (gap / gain over the mask), at most {report.steps} solver steps"
            + (f"; {unfinished} layers did not reach the tolerance" if unfinished else "")
        )
    _simpler(console, report)
    _lost(console, report)
    _weighed(console, report)
    _few_tokens(console, report.layers)
    _close_fit(console, report)
    if calibration.source == DEMO:
        console.print(
            "calibrated on source code of Python's standard library: for a model of anything else give --calibration "
            "a text of its own kind, or self for what it writes itself"
        )
    console.print(f"{report.seconds:.1f} s, peak memory {report.peak_memory / 2**20:.0f} MiB")
    console.print(
        f"written to {out} (plain transformers loads it; records in {out}/trimfit.json)", soft_wrap=True, markup=False
    )


def _data(calibration: CalibrationConfig) -> str:
    own = calibration.own_samples
    return calibration.source + (f", and {own} windows that the model wrote" if own else "")


def quantize(
    report: QuantizeReport, calibration: CalibrationConfig | None, form: str, out: Path, *, as_json: bool
) -> None:
    """Summary of a quantization."""
    if as_json:
        _print_json({"output": str(out), "file_format": form, **report.model_dump()})
        return
    config = report.config
    console = Console(markup=False, highlight=False)
    group = "one group a row" if config.group_size is None else f"groups of {config.group_size}"
    symmetry = "symmetric" if config.symmetric else "asymmetric"
    console.print(
        f"{len(report.layers)} layers quantized to {config.bits} bits ({group}, {symmetry}; "
        f"{report.bits_per_weight:.2f} bits a weight with scales), transform {config.transform}, "
        f"rounding {config.rounding}"
    )
    if calibration is None:
        console.print("no data was asked for or read, and no forward pass was run")
    else:
        console.print(f"{report.windows * report.window_length:,} calibration tokens ({_data(calibration)})")
    console.print(f"mean weight error {report.weight_error:.4f} (squared, relative)")
    online = form == "packed" and report.online_multiply_adds > 0  # dense weights have them multiplied in
    if online:
        console.print(f"online transformations add {report.online_multiply_adds:.1%} to the layers' multiply-adds")
    for reason in report.refused:
        console.print(f"left out: {reason}", soft_wrap=True)
    pruned = [record for record in report.layers if record.pruned]
    if pruned:
        zeros = sum(record.zeros for record in pruned) / len(pruned)
        console.print(f"{len(pruned)} layers were pruned; their zeros stay, {zeros:.2%} on average")
    _few_tokens(console, report.layers)
    console.print(f"{report.seconds:.1f} s, peak memory {report.peak_memory / 2**20:.0f} MiB")
    loads = {
        "gguf": "llama.cpp",
        "dense": "plain transformers",
        "packed": "transformers with compressed-tensors",
    }
    reader = "trimfit.load" if online else loads[form]
    console.print(f"written to {out} ({reader} loads it; records in {out}/trimfit.json)", soft_wrap=True)


def _simpler(console: Console, report: PruneReport) -> None:
    """Which layers the guard gave other weights than those asked for."""
    config = report.config
    tried = [record for record in report.layers if record.tokens and (record.sparsity or config.share)]
    simpler = [record.name for record in tried if record.accepted != config.refit]
    if simpler:
        console.print(
            f"{len(simpler)} layers keep simpler weights, which on held-out windows are nearer to the target than "
            f"{'the refit' if config.refit == 'optimal' else 'the update'}: {', '.join(simpler[:3])}"
            + (", …" if len(simpler) > 3 else "")
        )


def _lost(console: Console, report: PruneReport) -> None:
    """Which layers have errors above those of zeros."""
    lost = [record for record in report.layers if record.final.calibration > 1]
    if lost:
        worst = max(lost, key=lambda record: record.final.calibration)
        console.print(
            f"{len(lost)} layers have errors larger than their outputs, most of all {worst.name} "
            f"({worst.final.calibration:.3g}): at this sparsity little is left of the model"
            + ("; the target dense makes them larger still" if report.config.target == "dense" else "")
        )


def _weighed(console: Console, report: PruneReport) -> None:
    """Which layers had rows that counted as attention makes them, and whether they were asked for in vain."""
    weighed = sum(record.rows == "attention" for record in report.layers)
    if weighed:
        console.print(f"{weighed} layers (Q and K) were weighed by what attention makes of their errors")
    elif report.config.row_weights == "attention" and report.config.rows_matter:
        console.print(
            "no rows were weighed by attention: Q and K were not found, or attention is of the model's own kind"
        )


def _few_tokens(console: Console, records: Sequence[LayerRecord | QuantizedRecord]) -> None:
    """How many experts the calibration tokens were too few for."""
    few = [record for record in records if record.few_tokens]
    none = [record for record in few if not record.tokens]
    if few:
        console.print(
            f"{len(few)} layers of experts saw too few tokens for their width and were damped more"
            + (f", {len(none)} of them saw none, so data tells nothing of them" if none else "")
            + "; more calibration windows help"
        )


def _close_fit(console: Console, report: PruneReport) -> None:
    """What may be better where refits had few tokens for the width of their layers, and λ is as usual or less."""
    config = report.config
    if config.damping == "auto" or config.damping > DEFAULT_DAMPING or config.refit == "none":
        return
    least = min((r.tokens / r.shape[1] for r in report.layers if not r.few_tokens), default=_PLENTY)
    if least < _PLENTY:
        console.print(
            f"there are layers with only {least:.1f} calibration tokens for each input: more windows (--samples), or "
            f"--damping {'auto' if report.held_out_windows else '0.1'}, may give a better model"
        )


def score(result: Score, text: str, *, as_json: bool) -> None:
    """Result of an evaluation."""
    if as_json:
        _print_json({"text": text, **asdict(result)})
        return
    Console(soft_wrap=True, markup=False).print(
        f"perplexity {result.perplexity:.4f}   {result.bits_per_byte:.4f} bits/byte   "
        f"({result.nats:.4f} nats/token; {result.tokens:,} tokens, {result.bytes:,} bytes, "
        f"{result.documents} documents, windows of {result.window}; {text})"
    )


def evaluation(result: Evaluation, text: str | None, *, as_json: bool) -> None:
    """Score of the text and scores of the tasks, whichever there are."""
    if as_json:
        scored = {"text": text, **asdict(result.score)} if result.score else {}
        tasks = {"tasks": [asdict(task) for task in result.tasks]} if result.tasks else {}
        _print_json({**scored, **tasks})
        return
    if result.score:
        score(result.score, str(text), as_json=False)
    if result.tasks:
        table = empty_table("task", "metric", "value", "± error", "examples")
        for task in result.tasks:
            error = _number(task.standard_error, ".4f")
            table.add_row(Text(task.name), task.metric, f"{task.value:.4f}", error, f"{task.examples:,}")
        Console().print(table)


def demo(rows: Sequence[DemoRow], out: Path, *, as_json: bool) -> None:
    """The demo's table and samples."""
    if as_json:
        _print_json({"output": str(out), "rows": [_demo_json(row) for row in rows]})
        return
    console = Console()
    dense = rows[0]
    table = empty_table("model", "pattern", "weights", "perplexity", "error", "certificate", "steps", "seconds")
    table.add_row("dense", "", "", f"{dense.score.perplexity:.3f}", "", "", "", "")
    previous = None
    for row in rows[1:]:
        assert row.report is not None
        if row.pattern != previous:
            table.add_section()
            previous = row.pattern
        table.add_row(
            row.selector,
            row.pattern,
            "refitted" if row.refitted else "mask only",
            f"{row.score.perplexity:.3f}",
            _number(row.report.mean_error().held_out, ".4f"),
            _number(row.report.certificate, ".0e"),
            str(row.report.steps) if row.refitted else "–",
            f"{row.seconds:.1f}",
        )
    console.print(table, "")
    console.print(
        f"perplexity: {dense.score.tokens:,} tokens of standard-library modules that neither training nor calibration "
        f"saw, windows of {dense.score.window}; dense: {dense.score.bits_per_byte:.3f} bits/byte\n"
        "error: ‖X(Ŵ−W)ᵀ‖² / ‖XWᵀ‖² on held-out tokens, mean over layers\n"
        "certificate: proven bound on the distance to the optimum, relative to the gain over the mask; worst layer"
    )
    best = min((row for row in rows if row.refitted), key=lambda row: row.score.nats)
    for line in (
        f"\nprompt: {PROMPT!r}",
        f"dense:  {dense.sample!r}",
        f"pruned: {best.sample!r}  ({best.selector}, {best.pattern})",
        f"\nwritten to {out}: AutoModelForCausalLM.from_pretrained({str(out)!r}) loads it",
    ):
        console.print(line, markup=False, soft_wrap=True)


def _demo_json(row: DemoRow) -> dict[str, Any]:
    return {
        "selector": row.selector,
        "pattern": row.pattern,
        "refitted": row.refitted,
        "score": asdict(row.score),
        "layer_error": row.report.mean_error().model_dump() if row.report else None,
        "certificate": row.report.certificate if row.report else None,
        "steps": row.report.steps if row.report else None,
        "seconds": row.seconds,
        "sample": row.sample,
    }


def empty_table(*columns: str) -> Table:
    """An empty table; the first column is text, the others numbers."""
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)  # eight columns fit in 80 characters
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return made


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(_finite(value), indent=1, allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON has no infinity, which a perplexity can be: null instead."""
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {key: _finite(entry) for key, entry in value.items()}
        case list() | tuple():
            return [_finite(entry) for entry in value]
        case _:
            return value
