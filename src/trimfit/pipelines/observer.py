"""How a pipeline tells what it is doing."""

from typing import Protocol


class Finished(Protocol):
    """What an observer learns of a layer, whichever pipeline it was in."""

    @property
    def name(self) -> str:
        """Of the layer in the model."""
        ...

    @property
    def block(self) -> int:
        """Number of its block."""
        ...

    @property
    def error(self) -> float:
        """Relative error, the one that tells most."""
        ...


class Observer(Protocol):
    """Told of each stage and of each finished layer. Decides nothing."""

    def stage(self, text: str) -> None:
        """A new stage began."""
        ...

    def layer(self, record: Finished, done: float) -> None:
        """A layer is finished; `done` is the share of all weights that are."""
        ...


class Silent:
    """The observer that says nothing."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def layer(self, record: Finished, done: float) -> None:
        """Ignored."""
