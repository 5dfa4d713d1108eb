"""How a pipeline tells what it is doing."""

from typing import Protocol

from trimfit.pipelines.records import LayerRecord


class Observer(Protocol):
    """Told of each stage and of each finished layer. Decides nothing."""

    def stage(self, text: str) -> None:
        """A new stage began."""
        ...

    def layer(self, record: LayerRecord, done: float) -> None:
        """A layer is finished; `done` is the share of all weights that are."""
        ...


class Silent:
    """The observer that says nothing."""

    def stage(self, text: str) -> None:
        """Ignored."""

    def layer(self, record: LayerRecord, done: float) -> None:
        """Ignored."""
