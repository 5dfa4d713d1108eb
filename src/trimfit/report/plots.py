"""Plots of a comparison, drawn without a display."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimfit.errors import InputError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours without the yellow: told apart by the colour-blind, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_DASHES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v")
_PANEL = (2.6, 2.1)  # inches
_LETTERS, _HANDLE = 14, 9  # letters of the legend in an inch, and how many the sample beside a name takes


@dataclass(frozen=True)
class Curve:
    """Points with error bars.

    - `hue`, `style`: what colour and dashes stand for; equal names look equal in all panels. Also the legend's text.
    - `x`, `y`, `error`: of the points; an error is a standard deviation, 0 where it is unknown.
    - `joined`: whether a line goes through them.
    """

    hue: str
    style: str
    x: Sequence[float]
    y: Sequence[float]
    error: Sequence[float]
    joined: bool = True


def can_plot() -> bool:
    """Whether the drawing package is there."""
    return find_spec("matplotlib") is not None


def plot_curves(
    path: Path,
    curves: Sequence[Curve],
    points: Sequence[Curve],
    names: Sequence[str],
    *,
    x: str,
    y: str,
    level: tuple[str, float],
) -> None:
    """Lines on the left, points of named categories on the right, logarithmic ordinates: a PNG at `path`.

    `curves` may be empty, and so may `points`, whose `x` are numbers of their `names`. `x`, `y`: labels of the axes.
    `level`: name and height of a horizontal line, such as the dense model's. Raises `InputError` without matplotlib.
    """
    sides = [side for side in (curves, points) if side]
    figure = _figure(6.4, 4.2)
    ratios = [2.0 if side is curves else 1.0 for side in sides]
    grid = figure.subplots(1, len(sides), sharey=True, squeeze=False, width_ratios=ratios)
    looks = _Looks([*curves, *points])
    for axes, side in zip(grid.flat, sides, strict=True):
        axes.margins(y=0.1)
        for number, curve in enumerate(side):
            looks.draw(axes, curve, shift=0 if side is curves else 0.5 * (number + 0.5) / len(side) - 0.25)
        axes.axhline(level[1], color="0.5", linewidth=0.8)
        _dress(axes)
    grid[0, 0].set_ylabel(y, fontsize=9)
    grid[0, 0].annotate(
        level[0], (0.01, level[1]), xycoords=("axes fraction", "data"), va="top", fontsize=8, color="0.35"
    )
    if curves:
        grid[0, 0].set_xlabel(x, fontsize=9)
    if points:
        grid[0, -1].set_xticks(range(len(names)), names)
        grid[0, -1].set_xlim(-0.5, len(names) - 0.5)
    _save(figure, looks, path)


def plot_panels(path: Path, panels: Mapping[str, Sequence[Curve]], *, x: str, y: str) -> None:
    """Small panels side by side, each with its title, with common logarithmic ordinates: a PNG at `path`.

    Raises `InputError` without matplotlib.
    """
    columns = min(len(panels), 4)
    rows = -(-len(panels) // columns)
    figure = _figure(_PANEL[0] * columns + 0.6, _PANEL[1] * rows + 1.0)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    looks = _Looks([curve for curves in panels.values() for curve in curves])
    for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
        for curve in curves:
            looks.draw(axes, curve)
        _dress(axes)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(labelbottom=True)
        axes.set_title(title, fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel(x, fontsize=9)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    figure.supylabel(y, fontsize=9)
    _save(figure, looks, path)


class _Looks:
    """One colour for each hue, one kind of dashes and markers for each style, in the order in which they come."""

    def __init__(self, curves: Sequence[Curve]):
        self._hues = list(dict.fromkeys(curve.hue for curve in curves))
        self._styles = list(dict.fromkeys(curve.style for curve in curves))
        self.labels: dict[str, Any] = {}  # the stubs do not take a container of artists for one

    def draw(self, axes: "Axes", curve: Curve, shift: float = 0) -> None:
        """Draws the curve, moved by `shift` to the right; its look is put into the legend."""
        style = self._styles.index(curve.style)
        drawn = axes.errorbar(
            [x + shift for x in curve.x],
            curve.y,
            curve.error,
            color=_COLOURS[self._hues.index(curve.hue) % len(_COLOURS)],
            linestyle=_DASHES[style % len(_DASHES)] if curve.joined else "none",
            marker=_MARKERS[style % len(_MARKERS)],
            markersize=3.5,
            linewidth=1.2,
            elinewidth=0.8,
            capsize=2,
        )
        name = f"{curve.hue}, {curve.style}"
        if name not in self.labels or curve.joined:
            self.labels[name] = drawn


def _figure(width: float, height: float) -> "Figure":
    if not can_plot():
        raise InputError('plots need matplotlib: pip install "trimfit[report]"')
    from matplotlib.figure import Figure  # without pyplot: no display, no global state

    return Figure(figsize=(width, height), layout="constrained")


def _dress(axes: "Axes") -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5) if high < 100 * low else (1,)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: "Figure", looks: _Looks, path: Path) -> None:
    longest = max(map(len, looks.labels)) + _HANDLE
    columns = max(1, int(figure.get_figwidth() * _LETTERS) // longest)
    figure.legend(
        list(looks.labels.values()),
        list(looks.labels),
        loc="outside lower center",
        ncols=min(columns, 4),
        fontsize=8,
        frameon=False,
    )
    figure.savefig(path, dpi=160)
