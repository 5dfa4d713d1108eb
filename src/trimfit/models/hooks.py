"""Hooks and stand-ins that live as long as a context, and the way to end a forward pass early."""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class Stop(Exception):
    """Raised by a hook when the rest of a forward pass is not needed."""


@contextmanager
def before(pairs: Sequence[tuple[nn.Module, Callable[..., None]]], with_kwargs: bool = False) -> Generator[None]:
    """Hooks that see what modules receive: hook(module, arguments), or hook(module, arguments, keywords)."""
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=with_kwargs).remove)
        yield


@contextmanager
def after(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Generator[None]:
    """Hooks that see what modules give, hook(module, arguments, output), and put in its place what they return."""
    with ExitStack() as stack:
        for module, hook in pairs:
            stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def instead(pairs: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Generator[None]:
    """Functions that run in place of the modules' own `forward`, with the same arguments."""
    with ExitStack() as stack:
        for module, function in pairs:
            stack.callback(_restore, module, vars(module).get("forward"))
            vars(module)["forward"] = function
        yield


def _restore(module: nn.Module, own: Callable[..., Any] | None) -> None:
    """`own` is a forward that was there for this module alone."""
    if own is None:
        del vars(module)["forward"]
    else:
        vars(module)["forward"] = own
