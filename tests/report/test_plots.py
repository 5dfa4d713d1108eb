"""Plots, drawn without a display."""

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from trimfit import InputError
from trimfit.report import Curve, plot_curves, plot_panels, plots

LEVEL = ("dense 5.00", 5.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as they are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def savefig(figure: Figure, *arguments: object, **options: object) -> None:
        figures.append(figure)
        save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    monkeypatch.setenv("DISPLAY", ":no-such-display")
    return figures


def curve(hue: str, style: str, y: list[float], joined: bool = True) -> Curve:
    return Curve(hue, style, [float(i) for i in range(len(y))], y, [0.1] * len(y), joined)


def points(figure: Figure, panel: int) -> list[list[float]]:
    return [list(line[0].get_ydata()) for line in figure.axes[panel].containers]  # type: ignore[index]


def test_lines_left_categories_right(tmp_path: Path, drawn: list[Figure]) -> None:
    lines = [curve("wanda", "none", [9.0, 20.0]), curve("wanda", "refit", [6.0, 7.0])]
    marks = [curve("wanda", "none", [8.0, 9.5], False), curve("joint", "refit", [5.5, 5.6], False)]
    plot_curves(tmp_path / "plot.png", lines, marks, ["2:4", "4:8"], x="sparsity", y="perplexity", level=LEVEL)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    assert points(figure, 0) == [[9.0, 20.0], [6.0, 7.0]]
    assert points(figure, 1) == [[8.0, 9.5], [5.5, 5.6]]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["2:4", "4:8"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["wanda, none", "wanda, refit", "joint, refit"]  # each look once
    assert LEVEL[0] in [text.get_text() for text in figure.axes[0].texts]


@pytest.mark.parametrize("side", ["lines", "categories"])
def test_one_side_alone(tmp_path: Path, drawn: list[Figure], side: str) -> None:
    only = [curve("wanda", "none", [9.0])]
    lines, marks = (only, []) if side == "lines" else ([], only)
    plot_curves(tmp_path / "plot.png", lines, marks, ["2:4"] if marks else [], x="x", y="y", level=LEVEL)
    assert len(drawn[0].axes) == 1


def test_equal_names_look_equal_in_all_panels(tmp_path: Path, drawn: list[Figure]) -> None:
    panels = {
        f"layer {i}": [curve("wanda", "none", [0.1, 0.2]), curve("joint", "refit", [0.01, 0.02])][:: 1 - 2 * (i % 2)]
        for i in range(5)
    }
    plot_panels(tmp_path / "plot.png", panels, x="block", y="error")
    (figure,) = drawn
    looks = {
        (tuple(line[0].get_ydata()), line[0].get_color(), line[0].get_linestyle())  # type: ignore[index]
        for axes in figure.axes
        for line in axes.containers
    }
    assert len(looks) == 2
    assert [axes.get_title() for axes in figure.axes if axes.get_visible()] == list(panels)


def test_long_names_stay_in_the_picture(tmp_path: Path, drawn: list[Figure]) -> None:
    curves = [curve(f"selector {i}", "optimal refit, dense, uniform", [9.0 + i]) for i in range(5)]
    plot_curves(tmp_path / "plot.png", curves, [], [], x="x", y="y", level=LEVEL)
    (figure,) = drawn
    legend = figure.legends[0].get_window_extent()
    assert 0 <= legend.x0 < legend.x1 <= figure.bbox.width


def test_matplotlib_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r'pip install "trimfit\[report\]"'):
        plot_panels(tmp_path / "plot.png", {"a": [curve("wanda", "none", [1.0])]}, x="x", y="y")
