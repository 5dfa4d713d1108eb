"""trimfit: trim a language model, fit what is left to the optimum, in minutes, with a certificate.

The tensor rooms are imported here; what touches models (and therefore transformers) is imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from trimfit.errors import InputError, RunError, TrimfitError
from trimfit.refit import (
    Auto,
    Certificate,
    Cholesky,
    ConjugateGradients,
    FactoredGram,
    RefitSolution,
    Status,
    refit,
)

if TYPE_CHECKING:
    from trimfit.calibration import CalibrationConfig
    from trimfit.checkpoints import load_checkpoint
    from trimfit.evaluate import Score, perplexity, score_text
    from trimfit.pipelines import PruneConfig, PruneReport, prune, prune_checkpoint

_LAZY = {
    "CalibrationConfig": "trimfit.calibration",
    "PruneConfig": "trimfit.pipelines",
    "PruneReport": "trimfit.pipelines",
    "Score": "trimfit.evaluate",
    "load_checkpoint": "trimfit.checkpoints",
    "perplexity": "trimfit.evaluate",
    "prune": "trimfit.pipelines",
    "prune_checkpoint": "trimfit.pipelines",
    "score_text": "trimfit.evaluate",
}

__all__ = [
    "Auto",
    "CalibrationConfig",
    "Certificate",
    "Cholesky",
    "ConjugateGradients",
    "FactoredGram",
    "InputError",
    "PruneConfig",
    "PruneReport",
    "RefitSolution",
    "RunError",
    "Score",
    "Status",
    "TrimfitError",
    "load_checkpoint",
    "perplexity",
    "prune",
    "prune_checkpoint",
    "refit",
    "score_text",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'trimfit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
