"""Small chunks, so that small layers need several."""

import importlib

import pytest


@pytest.fixture
def chunked(monkeypatch: pytest.MonkeyPatch) -> None:
    # By name: as an attribute of the package, trimfit.refit is the function.
    monkeypatch.setattr(importlib.import_module("trimfit.refit.refinement"), "_CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(importlib.import_module("trimfit.refit.cholesky"), "_BATCH_ELEMENTS", 128)
