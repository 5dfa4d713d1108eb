"""What all benchmark scripts share."""

import argparse
import copy
import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import trimfit
from trimfit.calibration import CalibrationConfig, added_tokens, read_documents
from trimfit.calibration.standard_library import EVALUATION, read_modules
from trimfit.demo.run import model_path
from trimfit.evaluate import Score, TaskScore, evaluate_tasks, score_text
from trimfit.masks import parse_pattern
from trimfit.models import find_blocks
from trimfit.report.spread import Spread

PATTERNS: dict[str, dict[str, Any]] = {
    "50%": {"sparsity": 0.5},
    "60%": {"sparsity": 0.6},
    "70%": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
}


def quiet() -> None:
    """Silences the progress bars and notes of transformers."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def machine() -> str:
    """One line: date, processor, threads, versions."""
    names = ("trimfit", "torch", "transformers")
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    return f"{datetime.date.today()}, {processor()}, {torch.get_num_threads()} threads, {packages}"


def processor() -> str:
    """Model name and number of cores of the CPU, or the name of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def documents(name: str, characters: int | None, skip: float) -> list[str]:
    """The texts of a source without the first share `skip` of them; of each only the middle `characters`."""
    texts = read_modules(EVALUATION) if name == "demo" else read_documents(name)
    texts = texts[round(skip * len(texts)) :]
    if characters is None:
        return texts
    starts = [max(0, (len(text) - characters) // 2) for text in texts]
    return [text[start : start + characters] for text, start in zip(texts, starts, strict=True)]


def parser(description: str | None, *, seeds: int, samples: int = 64) -> argparse.ArgumentParser:
    """Arguments of every table: the model, what it is calibrated and scored on, and how many draws there are."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub name, or demo for the embedded model")
    parser.add_argument("--calibration", required=True, help="text file, demo, or self")
    parser.add_argument("--text", required=True, help="what is scored: text file or demo")
    parser.add_argument(
        "--skip", type=float, default=0.0, help="share of the text's documents, from its start, to skip"
    )
    parser.add_argument("--characters", type=int, help="of each document to score, from its middle")
    parser.add_argument("--samples", type=int, default=samples, help="calibration windows")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=seeds, help="draws of the calibration windows")
    parser.add_argument("--json", type=Path, help="file for the raw numbers")
    return parser


def add_task(parser: argparse.ArgumentParser) -> None:
    """An argument for tables that tell accuracy too; lm-eval is needed then."""
    parser.add_argument("--task", help="as of trimfit eval --tasks: demo, continuation:FILE")


class Bench:
    """The model and the text that the arguments of `parser` name; the dense weights are kept beside the model.

    `dense` is the score of the model as it came. With `float32` the model is in that, whatever it was stored in.
    """

    def __init__(self, arguments: argparse.Namespace, *, float32: bool = False):
        quiet()
        source = str(model_path()) if arguments.model == "demo" else arguments.model
        self.checkpoint = trimfit.load_checkpoint(source)
        self.model, self.tokenizer = self.checkpoint.model, self.checkpoint.tokenizer
        if float32:
            self.model.float()
        self.texts = documents(arguments.text, arguments.characters, arguments.skip)
        self.length: int = arguments.sequence_length
        self._samples: int = arguments.samples
        self._source = source
        self._state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self._reference: PreTrainedModel | None = None
        self.dense = self.score()

    def windows(self, source: str, seed: int, samples: int | None = None, own: int = 0) -> Tensor:
        """(own + samples, length) calibration windows: `own`, and those of "self", the model writes as it is now."""
        samples = samples or self._samples
        config = CalibrationConfig(
            source=source, samples=samples, own_samples=own, sequence_length=self.length, seed=seed
        )
        return config.windows(self.tokenizer, self.model)

    def restore(self) -> None:
        """Gives the model its dense weights back."""
        self.model.load_state_dict(self._state)

    def score(self, model: PreTrainedModel | None = None) -> Score:
        """How well `model` (by default the bench's own, as it is now) predicts the text."""
        return score_text(model or self.model, self.tokenizer, self.texts, length=self.length)

    def accuracy(self, task: str | None, model: PreTrainedModel | None = None) -> TaskScore | None:
        """Of `model` (by default the bench's own, as it is now); None where no task is asked for."""
        return None if task is None else evaluate_tasks(model or self.model, self.tokenizer, [task])[0]

    @torch.inference_mode()
    def divergence(self) -> float:
        """Mean KL divergence of the model's predictions from the dense model's, in nats per token of the full windows.

        Less noisy than a difference of perplexities: every token tells how far the two are apart. In float32.
        """
        if self._reference is None:
            self._reference = trimfit.load_checkpoint(self._source).model.float().eval()
        models = self._reference, copy.deepcopy(self.model).float().eval()
        total, count = 0.0, 0
        for batch in self._scored_windows().split(16):
            goal, found = (torch.log_softmax(model(input_ids=batch).logits, -1) for model in models)
            total += (goal.exp() * (goal - found)).sum().item()
            count += batch.numel()
        return total / count

    def _scored_windows(self) -> Tensor:
        before = added_tokens(self.tokenizer).before
        step = self.length - len(before)
        texts: list[list[int]] = [self.tokenizer(text, add_special_tokens=False).input_ids for text in self.texts]
        starts = [(ids, start) for ids in texts for start in range(0, len(ids) - step + 1, step)]
        return torch.tensor([[*before, *ids[start : start + step]] for ids, start in starts])


def indivisible(model: PreTrainedModel, pattern: dict[str, Any]) -> tuple[str, ...]:
    """Layers whose width the pattern does not divide; they lose no weights."""
    if "pattern" not in pattern:
        return ()
    m = parse_pattern(pattern["pattern"]).m
    layers = [layer for block in find_blocks(model) for layer in block.layers if layer.weight.shape[1] % m]
    return tuple(layer.name for layer in layers)


def with_error(score: TaskScore) -> str:
    """Accuracy ± its standard error over the questions, for a table."""
    return f"{score.value:.3f} ± {score.standard_error or 0.0:.3f}"


def mean_std(values: list[float], form: str) -> str:
    """Mean ± std of the values, for a table; the value where there is one, a dash where there is none."""
    spread = Spread.of(values)
    return "–" if spread is None else spread.text(form)
