"""Which cells a grid has."""

import itertools
from typing import Any

import pytest
from pydantic import ValidationError

from trimfit import CompareConfig, InputError, PruneConfig
from trimfit.masks import SELECTORS


def cells(config: CompareConfig) -> list[tuple[str | float | None, ...]]:
    return [(c.pattern or c.sparsity, c.selector, c.refit) for c in config.grid().configs]


def test_the_product_of_the_axes_without_what_cannot_exist() -> None:
    config = CompareConfig(selectors=("wanda", "sparsegpt"), sparsity=(0.5, 0.7), patterns=("2:4",))
    pairs = [("wanda", "none"), ("wanda", "optimal"), *(("sparsegpt", u) for u in ("none", "own", "optimal"))]
    assert cells(config) == [(p, *pair) for p, pair in itertools.product((0.5, 0.7, "2:4"), pairs)]
    (reason,) = config.grid().left_out
    assert "wanda has no weight update of its own" in reason


def test_all_selectors_and_updates_at_half_unless_asked() -> None:
    grid = cells(CompareConfig())
    assert set(grid) == {
        (0.5, name, update)
        for name, selector in SELECTORS.items()
        for update in (("none", "own", "optimal") if selector.updates_weights else ("none", "optimal"))
    }


def test_a_single_value_is_an_axis_of_one() -> None:
    single = CompareConfig.model_validate({"selectors": "wanda", "sparsity": 0.7, "reorder": True})
    assert (single.selectors, single.sparsity, single.reorder) == (("wanda",), (0.7,), (True,))


def test_patterns_alone_bring_no_sparsity() -> None:
    assert {p for p, _, _ in cells(CompareConfig(patterns=("2:4", "4:8")))} == {"2:4", "4:8"}


def test_a_scope_is_dropped_where_it_has_no_meaning() -> None:
    config = CompareConfig(selectors=("wanda",), sparsity=(0.5,), patterns=("2:4",), common={"scope": "layer"})
    assert {(c.pattern, c.scope) for c in config.grid().configs} == {(None, "layer"), ("2:4", None)}
    assert not any("scope" in reason for reason in config.grid().left_out)


def test_each_cell_once() -> None:
    config = CompareConfig(selectors=("wanda", "wanda"), updates=("none",), sparsity=(0.5, 0.50))
    assert cells(config) == [(0.5, "wanda", "none")]


def test_targets_are_an_axis() -> None:
    config = CompareConfig(selectors=("wanda",), updates=("optimal",), targets=("layer", "dense"))
    assert [c.target for c in config.grid().configs] == ["layer", "dense"]
    without = CompareConfig(selectors=("wanda",), updates=("optimal",))
    assert [c.target for c in without.grid().configs] == [PruneConfig().target]


def test_row_weights_are_an_axis() -> None:
    """Without values those of `prune` with the same selector; once where nothing depends on them."""
    asked = {"selectors": ("wanda", "joint"), "updates": ("optimal",), "patterns": ("2:4",)}
    both = CompareConfig(**asked, row_weights=("equal", "attention")).grid().configs
    assert [(c.selector, c.weighs_rows) for c in both] == list(itertools.product(("wanda", "joint"), (False, True)))
    without = CompareConfig(**asked).grid().configs
    assert [(c.selector, c.weighs_rows) for c in without] == [("wanda", False), ("joint", True)]
    assert [PruneConfig(selector=c.selector, pattern="2:4", guard=False) for c in without] == list(without)
    moot = CompareConfig(**asked | {"updates": ("none",)}, row_weights=("equal", "attention")).grid().configs
    assert [(c.selector, c.weighs_rows) for c in moot] == [("wanda", False), ("joint", False)]
    with pytest.raises(ValidationError, match="row_weights: "):
        CompareConfig(row_weights=("some",))


def test_allocations_are_an_axis_that_patterns_do_not_have() -> None:
    config = CompareConfig(
        selectors=("wanda",), updates=("none",), allocations=("uniform", "owl"), sparsity=(0.5,), patterns=("2:4",)
    )
    assert [(c.pattern, c.allocation) for c in config.grid().configs] == [
        (None, "uniform"),
        (None, "owl"),
        ("2:4", "uniform"),
    ]
    assert any("leaves no sparsity to split" in reason for reason in config.grid().left_out)


def test_orders_of_inputs_are_an_axis_of_patterns() -> None:
    config = CompareConfig(
        selectors=("joint",), updates=("none",), reorder=(True, False), sparsity=(0.5,), patterns=("2:4",)
    )
    assert [(c.pattern, c.reorder) for c in config.grid().configs] == [(None, None), ("2:4", True), ("2:4", False)]
    assert config.grid().left_out == ()


def test_common_settings_are_in_every_cell_and_nothing_chooses_by_held_out_windows() -> None:
    config = CompareConfig(selectors=("wanda", "joint"), common={"damping": 0.1, "held_out": 0.25})
    assert {(c.damping, c.held_out, c.guard) for c in config.grid().configs} == {(0.1, 0.25, False)}
    assert {c.guard for c in CompareConfig(common={"guard": True}).grid().configs} == {True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"selectors": ("wanda", "wandaa")}, "selectors: unknown selector 'wandaa': choose one of"),
        ({"updates": ("best",)}, "updates: input should be 'optimal', 'own' or 'none', but it is 'best'"),
        ({"sparsity": (0.5, 1.5)}, "sparsity: input should be less than 1, but it is 1.5"),
        ({"patterns": ("24",)}, "patterns: cannot read the pattern '24': write N:M"),
        ({"common": {"damping": -1}}, "damping: input should be greater than or equal to 0, but it is -1"),
        ({"common": {"refit": "own"}}, "refit cannot be common to all cells"),
        ({"common": {"colour": "red"}}, "colour: extra inputs are not permitted, but it is 'red'"),
        ({"seeds": 0}, "greater than or equal to 1"),
    ],
)
def test_values_that_no_cell_can_have(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        CompareConfig(**options)
    assert message in caught.value.errors()[0]["msg"].removeprefix("Value error, ").replace("Input", "input", 1)


def test_nothing_left() -> None:
    with pytest.raises(InputError, match="no combination of the axes exists: the selector wanda has no weight update"):
        CompareConfig(selectors=("wanda",), updates=("own",)).grid()
