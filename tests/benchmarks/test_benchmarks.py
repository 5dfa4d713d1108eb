"""Benchmark scripts at tiny size: they run from the checkout, and what they print adds up."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def on_the_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(SCRIPTS)
    yield
    for name in ("common", "gpu", "soak", "synthetic"):
        sys.modules.pop(name, None)


def test_gpu_prints_a_row_for_each_method(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    from transformers.utils import logging

    gpu: Any = importlib.import_module("gpu")
    monkeypatch.setattr(gpu, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--size", "tiny", "--blocks", "1"])
    verbosity = logging.get_verbosity()
    gpu.main()
    logging.set_verbosity(verbosity)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    header, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert header == gpu.HEADER
    assert [row[1:3] for row in rows[:-1]] == [[m, p] for m in gpu.METHODS for p in gpu.PATTERNS]
    assert rows[-1][1] == "quantize free"
    for row in rows:
        cells = dict(zip(header, row, strict=True))
        assert cells["blocks"] == "1 of 2"
        assert float(cells["whole model, s (× blocks)"]) == pytest.approx(2 * float(cells["s"]), abs=0.61)
        stages = (*gpu.STAGES, *gpu.QUANTIZING, "other", "opening and closing")
        seconds = [float(cells[f"{stage}, s"].replace("–", "0")) for stage in stages]
        assert sum(seconds) == pytest.approx(float(cells["s"]), abs=0.1)
    for row in rows[:-1]:
        cells = dict(zip(header, row, strict=True))
        assert float(cells["certificate"]) <= 1e-3 and int(cells["steps"]) > 0
    cells = dict(zip(header, rows[-1], strict=True))
    assert "–" not in [cells[f"{stage}, s"] for stage in (*gpu.QUANTIZING, "load", "save")]


def test_soak_prunes_in_every_way(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    soak: Any = importlib.import_module("soak")
    monkeypatch.setattr(soak, "quiet", lambda: None)
    monkeypatch.setattr(sys, "argv", ["soak.py", "--runs", "2", "--every", "1"])
    soak.main()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]
    assert [row[1] for row in rows] == ["1", "2"] * 4
    assert len({row[0] for row in rows}) == 4
    for once, twice in zip(rows[::2], rows[1::2], strict=True):
        assert once[3:] == twice[3:] and 0 < float(once[2]) < 10**5


def test_synthetic_activations_are_like_those_of_trained_models():
    """A few directions hold most of the energy, and a few channels are far above the others; the same every time."""
    synthetic: Any = importlib.import_module("synthetic")
    config = synthetic.llama(256, 512, 2, 4, 2, 500)
    model = synthetic.build(config, torch.float32, torch.device("cpu"))
    again = synthetic.build(config, torch.float32, torch.device("cpu"))
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, again.state_dict()[name])
    caught: dict[str, torch.Tensor] = {}
    names = ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")
    for name in names:
        module = model.get_submodule(f"model.layers.1.{name}")
        module.register_forward_pre_hook(
            lambda module, arguments, name=name: caught.__setitem__(name, arguments[0].flatten(0, 1).double())
        )
    with torch.no_grad():
        logits = model(input_ids=synthetic.tokens(config, 16, 64)).logits
    assert torch.isfinite(logits).all()
    for name, x in caught.items():
        gram = x.T @ x / len(x)
        energies = torch.linalg.eigvalsh(gram).flip(0)
        assert energies[: len(energies) // 50].sum() > 0.3 * energies.sum(), name  # 2 % of the directions
        assert gram.diagonal().max() > 20 * gram.diagonal().median(), name
