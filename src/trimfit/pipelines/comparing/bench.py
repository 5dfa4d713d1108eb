"""One model in memory, brought back to its dense weights for each cell of a comparison."""

import hashlib
import logging
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trimfit.calibration import CalibrationConfig
from trimfit.calibration.config import SELF
from trimfit.checkpoints import Checkpoint, fingerprint
from trimfit.errors import first_line
from trimfit.evaluate import Tasks, score_text
from trimfit.pipelines.comparing.comparison import Cell, pattern_name
from trimfit.pipelines.comparing.remembered import Remembered
from trimfit.pipelines.environment import versions
from trimfit.pipelines.observer import Finished, Observer
from trimfit.pipelines.pruning.config import PruneConfig
from trimfit.pipelines.pruning.prune import prune
from trimfit.pipelines.windows import digest, draw_windows

log = logging.getLogger(__name__)

TASK_PACKAGES = ("lm-eval", "datasets")  # what a score on tasks depends on besides


class Bench:
    """Prunes and scores copies of one model.

    - `checkpoint`: the dense model; a copy of its weights is kept on the CPU.
    - `calibrations`: the windows of the first seed, from one source or several.
    - `documents`, `window`: what is scored, as for `score_text`; `tasks`: what is asked too.
    - `limit`: the most windows of the text, and the most examples of each task.
    - `batch_size`: sequences in one forward pass for tasks, and where the model writes its own calibration text.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        calibrations: Sequence[CalibrationConfig],
        documents: Sequence[str],
        *,
        window: int,
        tasks: Tasks | None,
        limit: int | None,
        batch_size: int,
        observer: Observer,
    ):
        self._checkpoint, self._batch_size = checkpoint, batch_size
        self._calibrations = {calibration.source: calibration for calibration in calibrations}
        self._documents, self._window, self._limit, self._tasks = list(documents), window, limit, tasks
        self._observer = observer
        self._dense = {name: tensor.to("cpu", copy=True) for name, tensor in checkpoint.model.state_dict().items()}
        self._windows: tuple[str, int, Tensor] | None = None  # of one source and seed at a time
        self._measure = Remembered()

    def identity(self) -> dict[str, Any]:
        """All that the numbers depend on and a config does not tell."""
        first = next(iter(self._calibrations.values()))
        # The model and the config determine what it writes itself, which takes long to repeat.
        read = [calibration for calibration in self._calibrations.values() if calibration.source != SELF]
        windows = [digest(self._draw(calibration.source, calibration.seed)) for calibration in read]
        return {
            "model": fingerprint(self._checkpoint.model),
            "calibration": {**first.model_dump(mode="json"), "source": ", ".join(self._calibrations)},
            "windows": ", ".join(windows) or None,
            "text": hashlib.sha256("\0".join(self._documents).encode()).hexdigest(),
            "window": self._window,
            "tasks": self._tasks and self._tasks.fingerprint(),
            "limit": self._limit,
            "device": self._checkpoint.model.device.type,
            "versions": versions(*(TASK_PACKAGES if self._tasks else ())),
        }

    def dense(self) -> Cell:
        """The model as it came. Errors are raised: without this number no other means anything."""
        self._observer.stage("scoring the dense model")
        self._restore()
        return self._measured(Cell(config=None, seed=None))

    def cell(self, config: PruneConfig, source: str, seed: int, label: str) -> Cell:
        """One model pruned on windows of a source; no error is raised but marked.

        `label` goes before the stages that the observer is told.
        """
        observer = _Labelled(self._observer, label)
        cell = Cell(config=config, calibration=source, seed=seed)
        try:
            self._restore()
            windows = self._draw(source, seed)
            self._measure.begin()
            report = prune(self._checkpoint.model, windows, config, observer=observer, measure=self._measure)
            observer.stage("scoring")
            cell = cell.model_copy(update={"report": self._measure.told(report)})
            return self._measured(cell)
        except Exception as error:  # whatever it is, the other cells may go well
            failure = f"{type(error).__name__}: {first_line(error)}"
            log.warning("%s, %s, %s, seed %d: %s", config.selector, config.refit, pattern_name(config), seed, failure)
            return cell.model_copy(update={"failure": failure})

    def _restore(self) -> None:
        self._checkpoint.model.load_state_dict(self._dense)

    def _draw(self, source: str, seed: int) -> Tensor:
        if self._windows is None or self._windows[:2] != (source, seed):
            asked = self._calibrations[source].model_copy(update={"seed": seed})
            windows, _ = draw_windows(self._checkpoint, asked, self._batch_size, self._observer)
            self._windows, self._measure = (source, seed, windows), Remembered()
        return self._windows[2]

    def _measured(self, cell: Cell) -> Cell:
        """The cell with what the model as it is now reaches."""
        model, tokenizer = self._checkpoint.model, self._checkpoint.tokenizer
        limit, batch_size = self._limit, self._batch_size
        asked = self._tasks.evaluate(model, tokenizer, limit=limit, batch_size=batch_size) if self._tasks else []
        score = score_text(model, tokenizer, self._documents, length=self._window, limit_windows=limit)
        return cell.model_copy(update={"score": score, "tasks": tuple(asked)})


class _Labelled:
    """Observer that says which cell a stage belongs to."""

    def __init__(self, observer: Observer, label: str):
        self._observer, self._label = observer, label

    def stage(self, text: str) -> None:
        """Passes the stage on, after the label."""
        self._observer.stage(f"{self._label} {text}")

    def layer(self, record: Finished, done: float) -> None:
        """Passes it on."""
        self._observer.layer(record, done)
