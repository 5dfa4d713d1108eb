"""The `trimfit` command: reads arguments, calls one function, prints. Decides nothing."""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn, cast

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

from trimfit.cli import commands, compare, plan
from trimfit.cli.resume import resume
from trimfit.errors import InputError, ToldElsewhere, TrimfitError

_INTERRUPTED = 130
_SHARED = ("prune", "quantize", "resume")  # what several processes do together
_NOTHING_KEPT = "interrupted; nothing was written"

# The base of usage errors, public under no name: Typer imported Click's until it brought its own.
_UsageError = cast("type[Exception]", typer.BadParameter.__base__)

app = typer.Typer(
    name="trimfit",
    help="Trim a language model, fit what is left to the optimum, in minutes, with a certificate.",
    add_completion=False,
)
app.command("demo")(commands.demo)
app.command("prune")(commands.prune)
app.command("plan")(plan.plan)
app.command("quantize")(commands.quantize)
app.command("eval")(commands.evaluate)
app.command("resume")(resume)
app.command("compare")(compare.compare)


@app.callback()
def options(
    context: typer.Context,
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error. Works in any place."),
) -> None:
    """Options of every command."""
    if "RANK" in os.environ and context.invoked_subcommand not in _SHARED:
        from trimfit.ranks import launched

        if launched():
            raise InputError(f"trimfit {context.invoked_subcommand} runs in one process: start it without torchrun")


def main() -> None:
    """Entry point: 0 when all went well, 2 for wrong input, 1 for failure, 130 for Ctrl-C, 143 for SIGTERM."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(run(sys.argv[1:]))


def _terminate(number: int, frame: object) -> NoReturn:
    """Ends through the clean-up of everything that is open, so that nothing half-written stays."""
    raise SystemExit(128 + number)


def run(arguments: Sequence[str]) -> int:
    """Runs one command and returns its exit status. Errors become one sentence on standard error."""
    debug = "--debug" in arguments
    _show_warnings()
    try:
        _invoke([a for a in arguments if a != "--debug"])
        _flush()
        return 0
    except typer.Exit as end:  # help was asked for
        return end.exit_code
    except KeyboardInterrupt as error:
        kept = hasattr(error, "__notes__")
        return _fail(_with_notes("interrupted" if kept else _NOTHING_KEPT, error), _INTERRUPTED, debug)
    except SystemExit as error:  # SIGTERM
        if hasattr(error, "__notes__"):
            _fail(_with_notes("terminated", error), 1, debug)
        return error.code if isinstance(error.code, int) else 1
    except BrokenPipeError:  # the reader of our output had enough
        return 1
    except _UsageError as error:
        return _fail(_usage_problem(error), 2, debug)
    except ValidationError as error:
        return _fail(_first_problem(error), 2, debug)
    except ToldElsewhere as error:
        return error.exit_code
    except TrimfitError as error:
        return _fail(_with_notes(str(error), error), error.exit_code, debug)
    except Exception as error:
        if _is_out_of_memory(error):
            message = "out of memory; use fewer or shorter windows, or a smaller --batch-size"
            return _fail(_with_notes(message, error), 1, debug)
        text = str(error).strip().splitlines()
        message = f"{type(error).__name__}: {text[0] if text else 'no message'} (--debug shows where)"
        return _fail(_with_notes(message, error), 1, debug)


def _with_notes(message: str, error: BaseException) -> str:
    """The message with what was noted on the error on its way."""
    return "; ".join([message, *getattr(error, "__notes__", [])])


def _invoke(arguments: list[str]) -> None:
    """What `app()` does, without its own way to report errors and interrupts."""
    command = typer.main.get_command(app)
    with command.make_context("trimfit", arguments or ["--help"]) as context:
        command.invoke(context)


def _flush() -> None:
    """Shows a broken pipe or a full disk now, while the exit status can still say so."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        raise


def _fail(message: str, status: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    line = Text.assemble(("error:", "bold red"), " ", " ".join(message.splitlines()))
    Console(stderr=True, soft_wrap=True, highlight=False).print(line)
    return status


def _usage_problem(error: Exception) -> str:
    """The sentence about a wrong option or argument, with where to read about the right ones."""
    message = getattr(error, "format_message", error.__str__)()
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "trimfit"
    return f"{message.rstrip('.')}; see {command} --help"


def _first_problem(error: ValidationError) -> str:
    """The first of pydantic's complaints as a sentence about an option."""
    first = error.errors()[0]
    if first["type"] == "value_error":  # our own sentence
        return first["msg"].removeprefix("Value error, ")
    option = "--" + str(first["loc"][0]).replace("_", "-")
    # One complaint for each kind of value that the option may have.
    expected, *others = (one["msg"] for one in error.errors() if one["loc"][0] == first["loc"][0])
    message = ", or ".join([expected, *(other.removeprefix("Input should be ") for other in others)])
    return f"{option}: {message[0].lower()}{message[1:]}, but it is {first['input']!r}"


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error) or "allocate memory" in str(error)


class _Warnings(logging.Handler):
    """Writes to standard error as it is at that moment: a progress bar puts itself in between."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"warning: {record.getMessage()}", file=sys.stderr)


def _show_warnings() -> None:
    log = logging.getLogger("trimfit")
    log.handlers = [_Warnings(logging.WARNING)]
    log.propagate = False
