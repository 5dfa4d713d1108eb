"""Accuracy on tasks of lm-eval, on local task files, and on questions made from a text."""

import copy
import difflib
import hashlib
import io
import json
import logging
import random
import warnings
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimfit.calibration import read_documents
from trimfit.calibration.standard_library import EVALUATION, read_modules
from trimfit.errors import InputError, RunError, first_line
from trimfit.evaluate.continuation import continuation_examples
from trimfit.mode import forward_mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEMO = "demo"
CONTINUATION = "continuation:"
_HEADLINES = ("acc_norm", "acc")  # the usual ones; what else a task measures is taken in its own order
_BOOTSTRAPS = 1000  # for standard errors of metrics that are no means


@dataclass(frozen=True)
class TaskScore:
    """What a model reaches on one task.

    **Attributes**

    - `name`: of the task, as lm-eval has it, or as it was asked for if made from a text.
    - `metric`: the one to quote: acc_norm (each choice's likelihood over its length) where the task has it, else acc,
      else the first it has.
    - `value`, `standard_error`: of that metric; the error is over examples, None where lm-eval gives none.
    - `examples`: how many were asked.
    - `metrics`: every metric of the task, (value, standard error), under its name; with a filter as "metric (filter)".
    """

    name: str
    metric: str
    value: float
    standard_error: float | None
    examples: int
    metrics: dict[str, tuple[float, float | None]]


def evaluate_tasks(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> list[TaskScore]:
    """Evaluates a causal language model with lm-eval (`pip install "trimfit[eval]"`), on the device where it is.

    **Arguments**

    - `model`, `tokenizer`: of Transformers. The likelihoods are computed in float32 from the logits. Both are given
      back as they were. Inputs begin with BOS where the tokenizer puts it; those beyond the context lose their begin.
    - `tasks`: each is "demo", a choice among four continuations of passages of the evaluation text; or
      "continuation:SOURCE", the same from a text file, .jsonl file or hub data set; or a path of a task file (.yaml) in
      lm-eval's format, or of a directory of them; or a task, group or tag of lm-eval, whose data comes from the hub.
      Data files that a local task names are looked for in the working directory.
    - `limit`: ask only the first so many examples of each task.
    - `batch_size`: sequences in one forward pass.
    - `seed`: of few-shot examples. It changes no question, and the caller's random states are left alone.

    **Returns** one score for each task, in the order asked for; for a group one if it has a mean of its own, else one
    for each task in it. Raises `InputError` when lm-eval is not installed, a task is unknown, its data cannot be had,
    or it wants images or to run code; `RunError` when the model gives NaN.
    """
    check_limit(limit)
    if batch_size < 1:
        raise InputError(f"a batch needs at least 1 sequence, but batch_size is {batch_size}")
    return Tasks(tasks).evaluate(model, tokenizer, limit=limit, batch_size=batch_size, seed=seed)


def check_limit(limit: int | None) -> None:
    """Raises `InputError` for a number of examples of which nothing can be told."""
    if limit is not None and limit < 1:
        raise InputError(f"at least 1 example is needed, but a limit of {limit} was given")


class Tasks:
    """Tasks that are loaded, to be asked of one model or of many; `names` and errors as for `evaluate_tasks`."""

    def __init__(self, names: Sequence[str]):
        if isinstance(names, str):
            raise InputError(f"tasks must be a list of names, but it is the text {names!r}; write [{names!r}]")
        if not names:
            raise InputError("no task is named; give one, such as demo")
        with _quiet(), _seeded(0):
            self._parts = [_load(name) for name in dict.fromkeys(names)]
            self._together = _join(self._parts)
        for task in self._together["tasks"].values():
            _check(task)

    def fingerprint(self) -> str:
        """Of all questions, and of how they are asked: what scores of several models must have in common."""
        found = hashlib.sha256()
        with _quiet(), _seeded(0):
            for name, task in sorted(self._together["tasks"].items()):
                found.update(json.dumps([name, _way(task)], sort_keys=True, default=str).encode())
                for document in task.eval_docs:
                    found.update(json.dumps(document, sort_keys=True, default=str).encode())
        return found.hexdigest()

    def evaluate(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        limit: int | None = None,
        batch_size: int = 16,
        seed: int = 0,
    ) -> list[TaskScore]:
        """As `evaluate_tasks`."""
        evaluator = _lm_eval("evaluator")
        with _quiet(), _seeded(seed):
            for task in self._together["tasks"].values():
                _prepare(task, seed)
            with forward_mode(model), _refused_nan(model):
                results = evaluator.evaluate(
                    _wrap(model, tokenizer, batch_size),
                    self._together,
                    limit=limit,
                    bootstrap_iters=_BOOTSTRAPS,
                    log_samples=False,
                )
        return [_score(name, results, part) for part in self._parts for name in _reported(part, results)]


def _way(task: Any) -> Any:
    """How a task asks and counts. Functions, whose text need not tell all, are of the version of lm-eval."""
    config = task.config.to_dict()
    return {name: value for name, value in config.items() if name != "custom_dataset"}


def _lm_eval(module: str) -> Any:
    with _quiet():
        try:
            return import_module(f"lm_eval.{module}")
        except ImportError as error:
            raise InputError(
                f'tasks are evaluated by lm-eval, which cannot be imported ({error}): pip install "trimfit[eval]"'
            ) from error


@contextmanager
def _quiet() -> Generator[None]:
    """No progress bars, notes and warnings of lm-eval and what it is built on."""
    log = logging.getLogger("lm_eval")
    level = log.level
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # its bars know no other way to be turned off
        warnings.simplefilter("ignore")
        log.setLevel(logging.ERROR)
        try:
            yield
        finally:
            log.setLevel(level)


@contextmanager
def _seeded(seed: int) -> Generator[None]:
    """Tasks may draw from the global generators: from the same state each time, and it is put back."""
    before, numpy_before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(numpy_before)


def _load(task: str) -> dict[str, Any]:
    """lm-eval's own collection of tasks and groups for one thing that was asked for."""
    if task == DEMO:
        return _generated(task, read_modules(EVALUATION))
    if task.startswith(CONTINUATION):
        text = task.removeprefix(CONTINUATION)
        if not text:
            raise InputError(f"{CONTINUATION} is made from a text, but none is named; write {CONTINUATION}my-text.txt")
        return _generated(task, read_documents(text, split="test"))
    path = Path(task).expanduser()
    named_as_path = "/" in task or path.suffix in (".yaml", ".yml")
    if path.is_file() or (path.is_dir() and (named_as_path or any(path.rglob("*.y*ml")))):
        return _local(path)
    if named_as_path:
        raise InputError(f"there is no task file or directory {task}")
    return _registered(task)  # also beside a directory of that name, which may hold its data


def _generated(name: str, documents: list[str]) -> dict[str, Any]:
    datasets = import_module("datasets")  # lm-eval brings it
    questions = datasets.Dataset.from_list(continuation_examples(documents))
    config = {
        "task": name,
        "custom_dataset": lambda: {"test": questions},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": itemgetter("context"),
        "doc_to_choice": itemgetter("choices"),
        "doc_to_target": itemgetter("answer"),
        "target_delimiter": "",
        "num_fewshot": 0,
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    }
    return {"tasks": {name: _lm_eval("api.task").ConfigurableTask(config=config)}, "groups": {}, "group_map": {}}


def _local(path: Path) -> dict[str, Any]:
    try:
        if path.is_file():
            return _lm_eval("tasks").TaskManager(include_defaults=False).load([str(path)])
        manager = _lm_eval("tasks").TaskManager(include_path=path, include_defaults=False)
        loaded = manager.load(manager.all_subtasks)
    except InputError:
        raise
    except Exception as error:  # a task file can be wrong in many ways, and so can the code it names
        raise InputError(f"the task {path} cannot be used: {type(error).__name__}: {first_line(error)}") from error
    if not loaded["tasks"]:
        raise InputError(f"the directory {path} has no task file (.yaml) in lm-eval's format")
    return loaded


def _registered(name: str) -> dict[str, Any]:
    manager = _index()
    if name not in manager.all_tasks:
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else "name one of lm-eval, a task file, or demo"
        raise InputError(f"lm-eval has no task {name!r}; {advice}")
    try:
        return manager.load([name])
    except Exception as error:  # whatever the libraries between us and the hub raise
        raise InputError(
            f"the task {name} cannot be loaded ({type(error).__name__}: {first_line(error)}); its data comes from "
            "the Hugging Face hub, so the network or an earlier download is needed"
        ) from error


@cache
def _index() -> Any:
    """All tasks of lm-eval. It reads thousands of files for it, which takes many seconds."""
    return _lm_eval("tasks").TaskManager()


def _join(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    together: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    for part in parts:
        for name in part["tasks"]:
            if name in together["tasks"]:
                raise InputError(f"the task {name} is asked for twice, under different names; leave one out")
        for kind, entries in together.items():
            entries.update(part[kind])
    return together


def _check(task: Any) -> None:
    name = task.config.task
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"the task {name} runs code that the model writes, which trimfit does not")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"the task {name} has images or sound, but the model reads text only")


def _prepare(task: Any, seed: int) -> None:
    """What lm-eval's `simple_evaluate` does to tasks; the rest of it gathers facts about the machine, which is slow."""
    if task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=seed)


def _wrap(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int) -> Any:
    base: Any = _lm_eval("models.huggingface").HFLM

    class Loaded(base):
        @property
        def config(self) -> Any:
            """Without the quantization, which the loaded model has dealt with and lm-eval may not know."""
            config = copy.copy(model.config)
            config.__dict__.pop("quantization_config", None)
            return config

    return Loaded(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),  # it is given a padding token
        batch_size=batch_size,
        softmax_dtype=torch.float32,
    )


@contextmanager
def _refused_nan(model: "PreTrainedModel") -> Generator[None]:
    """lm-eval would take NaN for a likelihood and count what comes out."""

    def check(module: Any, inputs: Any, output: Any) -> None:
        if output.logits.isnan().any():
            raise RunError(
                "the model gives NaN: its weights are damaged or its dtype overflows; try to load it in float32"
            )

    with ExitStack() as stack:
        stack.callback(model.register_forward_hook(check).remove)
        yield


def _reported(part: dict[str, Any], results: dict[str, Any]) -> list[str]:
    outermost: list[str] = list(part["groups"])[:1]
    return outermost if outermost and outermost[0] in results.get("groups", {}) else list(part["tasks"])


def _score(name: str, results: dict[str, Any], part: dict[str, Any]) -> TaskScore:
    entries: dict[str, Any] = results["results"][name]
    metrics: dict[str, tuple[float, float | None]] = {}
    for key, value in entries.items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr"):
            continue
        error = entries.get(f"{metric}_stderr,{chosen}")
        label = metric if chosen == "none" else f"{metric} ({chosen})"
        metrics[label] = float(value), float(error) if isinstance(error, float) else None
    metric = next((m for m in _HEADLINES if m in metrics), next(iter(metrics)))
    counts: dict[str, Any] = results["n-samples"]
    members = [name] if name in counts else list(part["tasks"])
    return TaskScore(name, metric, *metrics[metric], sum(counts[m]["effective"] for m in members), metrics)
