"""What `trimfit demo` does: prunes the embedded model in several ways and measures each."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from trimfit.calibration import CalibrationConfig
from trimfit.calibration.standard_library import EVALUATION, read_modules
from trimfit.checkpoints import SIDECAR, check_output, fingerprint, load_checkpoint
from trimfit.errors import InputError
from trimfit.evaluate import Score, score_text
from trimfit.pipelines import Observer, PruneConfig, PruneRecord, PruneReport, prune, save_pruned

SELECTORS = ("wanda", "sparsegpt")  # joint is better, but takes longer than one likes to wait for a demo
PATTERNS: tuple[tuple[str, dict[str, float | str]], ...] = (
    ("50 %", {"sparsity": 0.5}),
    ("2:4", {"pattern": "2:4"}),
)
WINDOW = 256
SAMPLES = 28
SCORED_CHARACTERS = 4000  # from the middle of each evaluation module
_SOURCE = "demo"
PROMPT = 'def read_lines(path):\n    """'
NEW_TOKENS = 24


def model_path() -> Path:
    """Directory of the embedded model, a plain Hugging Face checkpoint."""
    return Path(str(files("trimfit.demo") / "model"))


@dataclass(frozen=True)
class DemoRow:
    """One model of the demo's table: the dense one (`report` is None) or a pruned one."""

    selector: str | None
    pattern: str | None
    score: Score
    report: PruneReport | None
    seconds: float
    sample: str

    @property
    def refitted(self) -> bool:
        """Whether the kept weights were refitted to the optimum."""
        return self.report is not None and self.report.config.refit == "optimal"


def run_demo(out: Path, observer: Observer, device: torch.device) -> Iterator[DemoRow]:
    """Gives the rows one by one: dense, then mask only and refitted for each pattern and selector.

    The refitted model with the lowest perplexity at 50 % is written to `out`, as `trimfit prune` would.
    Raises `InputError` when `out` exists and is not from an earlier demo.
    """
    if out.exists() and not _is_earlier_demo(out):
        raise InputError(f"{out} exists already and is not from an earlier demo; choose another output")
    check_output(out, overwrite=True)
    observer.stage("loading the embedded model")
    checkpoint = load_checkpoint(str(model_path()), device)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    calibration = CalibrationConfig(samples=SAMPLES, sequence_length=WINDOW)
    windows = calibration.windows(tokenizer, model)
    before = fingerprint(model)
    documents = [_middle(text) for text in read_modules(EVALUATION)]
    dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    yield _row(model, tokenizer, documents, None, None, 0.0)

    best: tuple[float, PruneReport, dict[str, torch.Tensor]] | None = None
    for label, pattern in PATTERNS:
        for selector in SELECTORS:
            for refit in ("none", "optimal"):
                model.load_state_dict(dense)
                asked = {"selector": selector, "refit": refit, "target": "layer", "batch_size": 4, **pattern}
                config = PruneConfig.model_validate(asked)
                start = time.perf_counter()
                report = prune(model, windows, config, observer=observer)
                row = _row(model, tokenizer, documents, label, report, time.perf_counter() - start)
                yield row
                if row.refitted and label == PATTERNS[0][0] and (best is None or row.score.nats < best[0]):
                    best = row.score.nats, report, {n: t.clone() for n, t in model.state_dict().items()}
    assert best is not None
    observer.stage(f"writing {out}")
    model.load_state_dict(best[2])
    record = PruneRecord(_SOURCE, model.device, before, calibration, windows, None, best[1])
    save_pruned(checkpoint, out, record, overwrite=True)


def _is_earlier_demo(out: Path) -> bool:
    try:
        return json.loads((out / SIDECAR).read_text(encoding="utf-8"))["source"] == _SOURCE
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _middle(text: str) -> str:
    start = max(0, (len(text) - SCORED_CHARACTERS) // 2)
    return text[start : start + SCORED_CHARACTERS]


def _row(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    documents: list[str],
    pattern: str | None,
    report: PruneReport | None,
    seconds: float,
) -> DemoRow:
    score = score_text(model, tokenizer, documents, length=WINDOW)
    selector = report.config.selector if report else None
    return DemoRow(selector, pattern, score, report, seconds, _continue(model, tokenizer))


def _continue(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """A few greedy tokens after the prompt."""
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids.to(model.device)
    generate: Any = model.generate
    with torch.inference_mode():
        output = generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False)
    return str(tokenizer.decode(output[0, ids.shape[1] :]))
