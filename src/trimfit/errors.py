"""Errors a user can act on. Each message is one sentence: what is wrong, where, and what to do."""


class TrimfitError(Exception):
    """Base of all errors raised on purpose. The command line prints the message and exits with `exit_code`."""

    exit_code = 1


class InputError(TrimfitError, ValueError):
    """What was given cannot be used: a file, an option, a tensor, a model."""

    exit_code = 2


class RunError(TrimfitError, RuntimeError):
    """The input was right, but the work could not be finished: disk full, verification failed."""

    exit_code = 1


class ToldElsewhere(TrimfitError):
    """An error that another process of the same run reports to the user."""

    def __init__(self, error: TrimfitError):
        super().__init__(str(error))
        self.exit_code = error.exit_code


def first_line(error: Exception) -> str:
    """What another library's error says, short enough to stand in a sentence of ours."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
