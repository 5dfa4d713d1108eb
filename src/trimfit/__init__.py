"""trimfit: trim a language model, fit what is left to the optimum, in minutes, with a certificate.

Everything is imported when it is first used, so that `import trimfit` and `trimfit --help` are quick.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from trimfit.errors import InputError, RunError, TrimfitError

if TYPE_CHECKING:
    from trimfit.calibration import CalibrationConfig
    from trimfit.checkpoints import load_checkpoint
    from trimfit.checkpoints.load import load
    from trimfit.evaluate import Score, TaskScore, evaluate_tasks, perplexity, score_text
    from trimfit.pipelines import (
        CompareConfig,
        Comparison,
        PruneConfig,
        PruneReport,
        QuantizeConfig,
        QuantizeReport,
        compare,
        prune,
        prune_checkpoint,
        quantize,
        quantize_checkpoint,
    )
    from trimfit.refit import (
        Auto,
        Certificate,
        Cholesky,
        ConjugateGradients,
        FactoredGram,
        RefitSolution,
        Status,
        refit,
        refit_together,
    )

_HOME = {
    "Auto": "trimfit.refit",
    "CalibrationConfig": "trimfit.calibration",
    "Certificate": "trimfit.refit",
    "Cholesky": "trimfit.refit",
    "CompareConfig": "trimfit.pipelines",
    "Comparison": "trimfit.pipelines",
    "ConjugateGradients": "trimfit.refit",
    "FactoredGram": "trimfit.refit",
    "PruneConfig": "trimfit.pipelines",
    "PruneReport": "trimfit.pipelines",
    "QuantizeConfig": "trimfit.pipelines",
    "QuantizeReport": "trimfit.pipelines",
    "RefitSolution": "trimfit.refit",
    "Score": "trimfit.evaluate",
    "Status": "trimfit.refit",
    "TaskScore": "trimfit.evaluate",
    "compare": "trimfit.pipelines",
    "evaluate_tasks": "trimfit.evaluate",
    "load": "trimfit.checkpoints.load",
    "load_checkpoint": "trimfit.checkpoints",
    "perplexity": "trimfit.evaluate",
    "prune": "trimfit.pipelines",
    "prune_checkpoint": "trimfit.pipelines",
    "quantize": "trimfit.pipelines",
    "quantize_checkpoint": "trimfit.pipelines",
    "refit_together": "trimfit.refit",
    "score_text": "trimfit.evaluate",
}

__all__ = [
    "Auto",
    "CalibrationConfig",
    "Certificate",
    "Cholesky",
    "CompareConfig",
    "Comparison",
    "ConjugateGradients",
    "FactoredGram",
    "InputError",
    "PruneConfig",
    "PruneReport",
    "QuantizeConfig",
    "QuantizeReport",
    "RefitSolution",
    "RunError",
    "Score",
    "Status",
    "TaskScore",
    "TrimfitError",
    "compare",
    "evaluate_tasks",
    "load",
    "load_checkpoint",
    "perplexity",
    "prune",
    "prune_checkpoint",
    "quantize",
    "quantize_checkpoint",
    "refit",
    "refit_together",
    "score_text",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'trimfit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """Makes `trimfit.refit` the function, although importing the subpackage of that name sets it to the module."""

    @property
    def refit(self) -> Any:
        return import_module("trimfit.refit").refit

    @refit.setter
    def refit(self, module: ModuleType) -> None:
        """The import system's assignment is not wanted."""


sys.modules[__name__].__class__ = _Package
