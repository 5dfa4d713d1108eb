"""From text or token ids to calibration windows."""

from trimfit.calibration.config import CalibrationConfig
from trimfit.calibration.fisher import CURVATURE_TOKENS, FisherSum, slope_of_a_draw
from trimfit.calibration.gram import Drift, InputMoments, MomentSum
from trimfit.calibration.self_sampling import SelfSample, sample_from_model
from trimfit.calibration.sources import read_documents, read_token_ids
from trimfit.calibration.windows import (
    AddedTokens,
    added_tokens,
    check_ids,
    context_length,
    encode_documents,
    held_out_count,
    sample_windows,
    split_held_out,
    window_length,
    windows_from_ids,
)

__all__ = [
    "CURVATURE_TOKENS",
    "AddedTokens",
    "CalibrationConfig",
    "Drift",
    "FisherSum",
    "InputMoments",
    "MomentSum",
    "SelfSample",
    "added_tokens",
    "check_ids",
    "context_length",
    "encode_documents",
    "held_out_count",
    "read_documents",
    "read_token_ids",
    "sample_from_model",
    "sample_windows",
    "slope_of_a_draw",
    "split_held_out",
    "window_length",
    "windows_from_ids",
]
