"""What all benchmark scripts share."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path

import torch

from trimfit.calibration import read_documents
from trimfit.calibration.standard_library import EVALUATION, read_modules


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
