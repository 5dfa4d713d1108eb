"""The help texts."""

from collections.abc import Callable

import pytest
import typer
from cli_helpers import Outcome

from trimfit.cli.main import app

Here = Callable[..., Outcome]
HELP = {
    "demo": ("--output", "--device", "--json", "embedded model"),
    "prune": (
        "--output",
        "--sparsity",
        "--pattern",
        "--selector",
        "--scope",
        "--reorder",
        "--refit",
        "--solver",
        "--tolerance",
        "--damping",
        "--capture",
        "--ignore",
        "--held-out",
        "--calibration",
        "--field",
        "--split",
        "--samples",
        "--sequence-length",
        "--seed",
        "--batch-size",
        "--device",
        "--overwrite",
        "--json",
    ),
    "resume": ("interrupted", "--device", "[default: that of the run]", "--json"),
    "plan": ("--offload", "--memory-limit", "--samples", "--output", "--json"),
    "quantize": (
        "--output",
        "--bits",
        "--group-size",
        "--symmetric",
        "--transform",
        "--rounding",
        "--block-size",
        "--learned-steps",
        "--damping",
        "--ignore",
        "--calibration",
        "asks for no data unless --calibration is given",
        "--field",
        "--split",
        "--samples",
        "--sequence-length",
        "--seed",
        "--batch-size",
        "--format",
        "--device",
        "--overwrite",
        "--json",
    ),
    "compare": (
        "--output",
        "--selectors",
        "--updates",
        "--targets",
        "--allocations",
        "--sparsity",
        "--patterns",
        "--seeds",
        "--calibration",
        "--text",
        "--text-split",
        "--tasks",
        "--limit",
        "--guard",
        "--json",
        "goes on where it was interrupted",
    ),
    "eval": ("--text", "--field", "--split", "--window", "--limit", "--device", "--json"),
}


@pytest.mark.parametrize("command", HELP)
def test_every_option_is_explained(command: str, here: Here) -> None:
    outcome = here(command, "--help")
    assert (outcome.status, outcome.stderr) == (0, "")
    assert f"trimfit {command}" in outcome.stdout
    for words in HELP[command]:
        assert words in outcome.stdout


@pytest.mark.parametrize("command", HELP)
def test_nothing_of_an_explanation_is_taken_for_markup(
    command: str, here: Here, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`[default: 0.5]` unescaped would be a style, and gone."""
    monkeypatch.setenv("COLUMNS", "1000")  # each explanation on one line
    printed = here(command, "--help").stdout
    written = [parameter.help for parameter in typer.main.get_command(app).commands[command].params]
    assert len(written) >= 3
    for explanation in written:
        assert explanation.replace("\\[", "[") in printed


@pytest.mark.parametrize("arguments", [(), ("--help",)], ids=["bare", "help"])
def test_commands_are_listed(arguments: tuple[str, ...], here: Here) -> None:
    outcome = here(*arguments)
    assert (outcome.status, outcome.stderr) == (0, "")
    for words in (*HELP, "--debug"):
        assert words in outcome.stdout
