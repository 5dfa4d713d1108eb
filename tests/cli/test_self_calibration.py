"""`trimfit prune --calibration self`: the model is its own data, and what it wrote is kept."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import (
    FILES,
    Outcome,
    is_one_sentence,
    make_model,
    make_tokenizer,
    nothing_but,
    read_record,
    save_model,
)
from refusals import damage
from torch.nn import Linear
from transformers import AutoModelForCausalLM

from trimfit import CalibrationConfig, load_checkpoint

WRITTEN = FILES | {"calibration.npy"}
SIZES = ("--samples", "8", "--sequence-length", "24", "--batch-size", "2")
Prune = Callable[..., Outcome]


@pytest.fixture
def prune(here: Callable[..., Outcome], tiny: Path, tmp_path: Path) -> Prune:
    """Prunes the tiny model to `tmp_path / name`, calibrated on itself unless told otherwise."""

    def prune(name: str, *options: str | Path, calibration: str | Path = "self", model: Path = tiny) -> Outcome:
        return here("prune", model, "-o", tmp_path / name, "--calibration", calibration, *SIZES, *options)

    return prune


def weights_of(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_the_windows_and_how_they_look_are_kept(prune: Prune, tiny: Path, tmp_path: Path) -> None:
    outcome = prune("out")
    assert outcome.status == 0, outcome.stderr
    assert "(self)" in outcome.stdout
    assert nothing_but(tmp_path, ["out"])
    assert nothing_but(tmp_path / "out", WRITTEN)
    record = read_record(tmp_path / "out")
    assert record["calibration"]["source"] == "self"
    assert (record["windows"], record["held_out_windows"], record["window_length"]) == (7, 1, 24)

    dense = load_checkpoint(str(tiny))
    config = CalibrationConfig(source="self", samples=8, sequence_length=24)
    sample = config.draw(dense.tokenizer, dense.model)[1]
    assert sample is not None
    digest = hashlib.sha256(sample.windows.numpy().tobytes()).hexdigest()
    assert record["fingerprints"]["tokens"] == digest
    assert record["self_sample"] == pytest.approx(sample.record())
    assert 0 < sample.entropy < sample.largest_entropy
    kept = np.load(tmp_path / "out" / "calibration.npy")
    assert sorted(kept.tolist()) == sorted(sample.windows.tolist())
    assert (kept[:, 0] == make_tokenizer().bos_token_id).all()

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    pruned = [module.weight for layer in model.model.layers for module in layer.modules() if isinstance(module, Linear)]
    assert torch.cat([weight.flatten() == 0 for weight in pruned]).double().mean() == 0.5


def test_the_run_can_be_repeated_by_seed_and_from_the_kept_windows(prune: Prune, tmp_path: Path) -> None:
    outcomes = [
        prune("first"),
        prune("again", "--json"),
        prune("other", "--seed", "1"),
        prune("reused", calibration=tmp_path / "first" / "calibration.npy"),
    ]
    assert [outcome.status for outcome in outcomes] == [0] * 4
    assert json.loads(outcomes[1].stdout)["config"] == read_record(tmp_path / "again")["config"]
    first = tmp_path / "first"
    for name in WRITTEN - {"trimfit.json"}:
        assert (tmp_path / "again" / name).read_bytes() == (first / name).read_bytes(), name
    assert weights_of(tmp_path / "other") != weights_of(first)
    assert weights_of(tmp_path / "reused") == weights_of(first)
    reused = read_record(tmp_path / "reused")
    assert reused["fingerprints"] == read_record(first)["fingerprints"]
    assert reused["layers"][0]["final"] == read_record(first)["layers"][0]["final"]
    assert reused["self_sample"] is None
    assert not (tmp_path / "reused" / "calibration.npy").exists()


def test_windows_of_its_own_beside_a_text(prune: Prune, tiny: Path, text: Path, tmp_path: Path) -> None:
    """They are kept, and not those of the text."""
    outcome = prune("out", "--own-samples", "4", calibration=text)
    assert outcome.status == 0, outcome.stderr
    assert "and 4 windows that the model wrote)" in " ".join(outcome.stdout.split())
    assert nothing_but(tmp_path / "out", WRITTEN)
    record = read_record(tmp_path / "out")
    assert (record["windows"], record["held_out_windows"]) == (10, 2)
    dense = load_checkpoint(str(tiny))
    config = CalibrationConfig(source=str(text), samples=8, own_samples=4, sequence_length=24)
    windows, sample = config.draw(dense.tokenizer, dense.model)
    assert sample is not None
    assert record["fingerprints"]["tokens"] == hashlib.sha256(windows.numpy().tobytes()).hexdigest()
    assert record["self_sample"] == pytest.approx(sample.record())
    kept = np.load(tmp_path / "out" / "calibration.npy")
    assert sorted(kept.tolist()) == sorted(sample.windows.tolist())

    assert prune("none", calibration=text).status == 0
    assert weights_of(tmp_path / "none") != weights_of(tmp_path / "out")
    for options, source in ((["--own-samples", "4"], "self"), (["--own-samples", "4", "--offload"], text)):
        refused = prune("refused", *options, calibration=source)
        assert is_one_sentence(refused)
        assert "--own-samples" in refused.stderr or "own_samples" in refused.stderr
        assert not (tmp_path / "refused").exists()


def test_an_older_output_is_replaced_as_a_whole(prune: Prune, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for name in ("trimfit.json", "old"):
        (tmp_path / "out" / name).write_text("{}")
    assert prune("out").status == 2
    assert nothing_but(tmp_path / "out", ["old", "trimfit.json"])
    assert prune("out", "--overwrite").status == 0
    assert nothing_but(tmp_path / "out", WRITTEN)
    assert nothing_but(tmp_path, ["out"])
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == {0o666 & ~umask}


def test_a_file_of_that_name_does_not_stand_for_the_model(
    prune: Prune, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "self").write_bytes(text.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert prune("model").status == 0
    assert prune("file", calibration="./self").status == 0
    assert (tmp_path / "model" / "calibration.npy").is_file()
    assert not (tmp_path / "file" / "calibration.npy").exists()


def test_a_model_that_writes_noise_is_said(prune: Prune, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    outcome = prune("out", model=save_model(tmp_path / "noisy", model))
    assert outcome.status == 0
    assert outcome.stderr.startswith("warning: the model writes noise (5.70 nats per token, where 5.70 is choosing")
    assert len(outcome.stderr.splitlines()) == 1


def test_a_damaged_model_is_refused(prune: Prune, tmp_path: Path) -> None:
    model = make_model()
    damage("lm_head.weight", torch.nan)(model)
    outcome = prune("out", model=save_model(tmp_path / "damaged", model))
    assert outcome.status == 2
    assert is_one_sentence(outcome)
    assert "NaN" in outcome.stderr
    assert nothing_but(tmp_path, ["damaged"])
