"""Measures a checkpoint on disk: how well it predicts a text, and what it reaches on tasks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trimfit.calibration import read_documents, window_length
from trimfit.calibration.standard_library import EVALUATION, read_modules
from trimfit.checkpoints import Checkpoint, load_checkpoint
from trimfit.errors import InputError
from trimfit.evaluate import Score, TaskScore, evaluate_tasks, score_text
from trimfit.pipelines.observer import Observer, Silent


@dataclass(frozen=True)
class Evaluation:
    """`score` is None when no text was given, `tasks` empty when none was named."""

    score: Score | None
    tasks: list[TaskScore]


def evaluate_checkpoint(
    source: str,
    *,
    text: str | None = None,
    field: str = "text",
    split: str = "test",
    window: int | None = None,
    tasks: Sequence[str] = (),
    batch_size: int = 16,
    seed: int = 0,
    limit: int | None = None,
    device: torch.device | None = None,
    observer: Observer | None = None,
) -> Evaluation:
    """Scores a model directory or hub name, which may be quantized if trimfit wrote it.

    **Arguments**

    - `text`, `field`, `split`, `window`: what to predict; "demo" is the standard-library modules kept aside.
      `window` is capped by the model's context, which it is when None, but at most 2048.
    - `tasks`, `batch_size`, `seed`: as for `evaluate_tasks`.
    - `limit`: the most windows of the text, and the most examples of each task.

    Raises `InputError` when there is neither a text nor a task, and as `evaluate_tasks` and `score_text` do.
    """
    if text is None and not tasks:
        raise InputError("there is nothing to evaluate: give --text, --tasks or both; see trimfit eval --help")
    observer = observer or Silent()
    documents: list[str] = []
    if text is not None:
        documents = read_modules(EVALUATION) if text == "demo" else read_documents(text, field=field, split=split)
    observer.stage(f"loading {source}")
    checkpoint = load_checkpoint(source, device, quantized=True)
    scores: list[TaskScore] = []
    if tasks:  # first, as a mistyped name ends the run
        observer.stage(f"tasks {', '.join(tasks)}")
        model, tokenizer = checkpoint.model, checkpoint.tokenizer
        scores = evaluate_tasks(model, tokenizer, tasks, limit=limit, batch_size=batch_size, seed=seed)
    score = None
    if text is not None:
        observer.stage(f"scoring {text}")
        score = _score(checkpoint, documents, window, limit)
    return Evaluation(score, scores)


def _score(checkpoint: Checkpoint, documents: list[str], window: int | None, limit: int | None) -> Score:
    length = window_length(window, checkpoint.model.config)
    return score_text(checkpoint.model, checkpoint.tokenizer, documents, length=length, limit_windows=limit)
