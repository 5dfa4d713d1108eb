"""How pruning depends on the calibration windows: how many, from which text, by which seed, and how damped.

    python benchmarks/robustness.py demo --calibration demo --text demo --other TEXT --characters 4000
    python benchmarks/robustness.py MODEL --calibration FIRST_HALF --text SECOND_HALF --other demo --skip 0.85

Every selector with its defaults, refitted, each cell from the dense model; scored on text of the model's own domain.
Excess is nats per token over the dense model. With --task cells of the first seed have their accuracy too, ± its
standard error over the questions. The file of `--json` gets a line for each finished cell: the same command
goes on from there, and with more `--counts` or `--seeds` adds to them. Prints Markdown tables of all cells that there
are, and the pairs of settings in which a lower layer error did not give a lower perplexity.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import PATTERNS, Bench, add_task, indivisible, machine, mean_std, parser, with_error
from torch import Tensor

import trimfit
from trimfit.masks import SELECTORS
from trimfit.pipelines.runs.journal import Journal


@dataclass(frozen=True)
class Setting:
    """What a cell varies; `source` is "own" for the text given to --calibration, "self" or "other"."""

    source: str
    samples: int
    pattern: str
    selector: str
    damping: float | str = 0.01


@dataclass(frozen=True)
class Cell:
    setting: Setting
    seed: int
    perplexity: float
    excess: float
    layer_error: float
    seconds: float
    accuracy: str | None = None


def main() -> None:
    arguments = _arguments()
    bench = Bench(arguments)
    texts = {"own": arguments.calibration, "other": arguments.other, "self": "self"}
    named = ("model", "calibration", "other", "text", "skip", "characters", "sequence_length", "task")
    dense = bench.accuracy(arguments.task)
    with Journal(arguments.json) as journal:
        cells = [_cell(record) for record in journal.open({name: getattr(arguments, name) for name in named})]
        done = {(cell.setting, cell.seed) for cell in cells}
        for setting, seed in _wanted(arguments):
            if (setting, seed) in done:
                continue
            bench.restore()
            windows = bench.windows(texts[setting.source], seed, setting.samples)
            cells.append(measure(bench, windows, setting, seed, arguments.task if seed == 0 else None))
            done.add((setting, seed))
            journal.append(asdict(cells[-1]))
            print(json.dumps(asdict(cells[-1])), flush=True)
    print(f"\n{machine()}\n")
    print(
        f"{arguments.model}: windows of {bench.length} tokens ({arguments.calibration}; other: {arguments.other}), an "
        f"eighth held out; {bench.dense.tokens:,} tokens scored ({arguments.text}); dense perplexity "
        f"{bench.dense.perplexity:.3f}. Perplexity (excess nats, mean ± std over seeds).\n"
    )
    print("\n\n".join(tables(cells, arguments.samples, scores)))
    if dense is not None:
        print(f"\nAccuracy on {arguments.task}, {dense.examples} questions, first seed; dense {with_error(dense)}.\n")
        print("\n\n".join(tables(cells, arguments.samples, accuracy)))
    print("\n" + draws(cells, arguments.samples) + "\n\n" + contradictions(cells))


def _arguments() -> argparse.Namespace:
    arguments = parser(__doc__, seeds=3)
    arguments.set_defaults(json=Path("robustness.jsonl"))
    arguments.add_argument("--other", required=True, help="calibration text of another domain")
    arguments.add_argument("--counts", type=int, nargs="*", default=[8, 16, 32, 64, 128, 256, 512], help="of windows")
    arguments.add_argument("--draws", type=int, default=5, help="seeds for --samples windows of the model's own domain")
    arguments.add_argument("--damped", type=int, nargs="*", default=[8, 32], help="counts with which damping is varied")
    arguments.add_argument("--patterns", nargs="*", choices=PATTERNS, default=["50%", "2:4"])
    arguments.add_argument("--selectors", nargs="*", choices=SELECTORS, default=list(SELECTORS))
    add_task(arguments)
    return arguments.parse_args()


def _wanted(arguments: argparse.Namespace) -> Iterator[tuple[Setting, int]]:
    """All cells, seed by seed, so that what there is when a run is cut short is a whole table with fewer seeds."""
    grid = list(itertools.product(arguments.patterns, arguments.selectors))
    for seed in range(max(arguments.seeds, arguments.draws)):
        if seed < arguments.draws:
            yield from ((Setting("own", arguments.samples, *which), seed) for which in grid)
        if seed >= arguments.seeds:
            continue
        for source in ("self", "other"):
            yield from ((Setting(source, arguments.samples, *which), seed) for which in grid)
        for samples, pattern, damping in itertools.product(arguments.damped, arguments.patterns, (0.01, 0.1, "auto")):
            yield Setting("own", samples, pattern, "joint", damping), seed
        yield from ((Setting("own", n, *which), seed) for n in arguments.counts for which in grid)


def measure(bench: Bench, windows: Tensor, setting: Setting, seed: int, task: str | None) -> Cell:
    pattern = PATTERNS[setting.pattern]
    asked = {"selector": setting.selector, "damping": setting.damping, "ignore": indivisible(bench.model, pattern)}
    config = trimfit.PruneConfig.model_validate(asked | pattern)
    report = trimfit.prune(bench.model, windows, config)
    score = bench.score()
    error = report.mean_error().held_out
    assert error is not None  # an eighth of the windows is held out
    reached = bench.accuracy(task)
    excess = score.nats - bench.dense.nats
    accuracy = None if reached is None else with_error(reached)
    return Cell(setting, seed, score.perplexity, excess, error, report.seconds, accuracy)


def tables(cells: Sequence[Cell], samples: int, entry: Callable[[Sequence[Cell], Setting], str]) -> Iterator[str]:
    """Markdown. `samples` is the number of windows where something else varies; `entry` tells of a setting."""
    patterns, selectors = _axes(cells)
    counts = sorted({cell.setting.samples for cell in cells})
    for pattern in patterns:
        rows = {s: [entry(cells, Setting("own", n, pattern, s)) for n in counts] for s in selectors}
        yield table(f"{pattern}, by windows", counts, rows)
    for pattern in patterns:
        sources = ["own", "self", "other"]
        rows = {s: [entry(cells, Setting(source, samples, pattern, s)) for source in sources] for s in selectors}
        yield table(f"{pattern}, {samples} windows of", sources, rows)
    dampings = [0.01, 0.1, "auto"]
    varied = sorted({(c.setting.pattern, c.setting.samples) for c in cells if c.setting.damping != 0.01})
    rows = {
        f"{pattern}, {n} windows": [entry(cells, Setting("own", n, pattern, "joint", d)) for d in dampings]
        for pattern, n in varied
    }
    yield table("joint, by damping", dampings, rows)


def scores(cells: Sequence[Cell], setting: Setting) -> str:
    """Of the cells with this setting: perplexity, and in brackets the excess."""
    found = [cell for cell in cells if cell.setting == setting]
    return f"{_mean(found, 'perplexity'):.2f} ({mean_std([cell.excess for cell in found], '.4f')})" if found else "–"


def accuracy(cells: Sequence[Cell], setting: Setting) -> str:
    """Of the cell with this setting that has one."""
    return next((cell.accuracy for cell in cells if cell.setting == setting and cell.accuracy), "–")


def draws(cells: Sequence[Cell], samples: int) -> str:
    """Markdown: by selector, what different windows of the model's own domain give."""
    patterns, selectors = _axes(cells)
    heads = [f"{pattern}: {head}" for pattern in patterns for head in ("perplexity, excess", "layer error", "seeds")]
    return table(f"{samples} windows", heads, {s: _draws(cells, samples, patterns, s) for s in selectors})


def _draws(cells: Sequence[Cell], samples: int, patterns: Sequence[str], selector: str) -> Iterator[str]:
    for setting in (Setting("own", samples, pattern, selector) for pattern in patterns):
        found = [cell for cell in cells if cell.setting == setting]
        yield scores(cells, setting)
        yield mean_std([cell.layer_error for cell in found], ".4f")
        yield str(len(found))


def contradictions(cells: Sequence[Cell]) -> str:
    """Pairs on the same windows where the lower mean layer error has the higher mean excess."""
    runs: dict[Setting, dict[int, Cell]] = {}
    for cell in cells:
        runs.setdefault(cell.setting, {})[cell.seed] = cell
    lines = ["| where | lower layer error: error, perplexity | lower perplexity | seeds |", "|---|---|---|---|"]
    pairs = 0
    for a, b in itertools.combinations(runs, 2):
        seeds = runs[a].keys() & runs[b].keys()
        if not seeds or (a.source, a.samples, a.pattern) != (b.source, b.samples, b.pattern):
            continue
        pairs += 1
        both = [[runs[setting][seed] for seed in sorted(seeds)] for setting in (a, b)]
        both.sort(key=lambda found: _mean(found, "layer_error"))
        if _mean(both[0], "excess") <= _mean(both[1], "excess"):
            continue
        held = sum(x.layer_error < y.layer_error and x.excess > y.excess for x, y in zip(*both, strict=True))
        where = f"{a.pattern}, {a.samples} windows, {a.source}"
        lines.append(f"| {where} | {_named(both[0])} | {_named(both[1])} | {held} of {len(seeds)} |")
    return f"{len(lines) - 2} of {pairs} pairs:\n\n" + "\n".join(lines)


def _axes(cells: Sequence[Cell]) -> tuple[list[str], list[str]]:
    patterns, selectors = ([getattr(c.setting, axis) for c in cells] for axis in ("pattern", "selector"))
    return list(dict.fromkeys(patterns)), list(dict.fromkeys(selectors))


def _named(found: Sequence[Cell]) -> str:
    setting = found[0].setting
    damped = "" if setting.damping == 0.01 else f" (damping {setting.damping})"
    return f"{setting.selector}{damped}: {_mean(found, 'layer_error'):.4f}, {_mean(found, 'perplexity'):.2f}"


def _mean(cells: Sequence[Cell], quantity: str) -> float:
    return statistics.fmean(getattr(cell, quantity) for cell in cells)


def table(corner: str, columns: Sequence[object], rows: Mapping[str, Iterable[str]]) -> str:
    """Markdown."""
    lines = [[corner, *map(str, columns)], *([name, *entries] for name, entries in rows.items())]
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, "|---" * (len(columns) + 1) + "|", *body])


def _cell(record: dict[str, Any]) -> Cell:
    return Cell(Setting(**record.pop("setting")), **record)


if __name__ == "__main__":
    main()
