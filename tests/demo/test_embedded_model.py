"""What is claimed of the embedded model and of the texts it was trained, calibrated and evaluated on."""

import json
import logging
import lzma
from pathlib import Path

import pytest
import torch

from trimfit import CalibrationConfig, InputError, load_checkpoint, score_text
from trimfit.calibration import standard_library
from trimfit.calibration.standard_library import CALIBRATION, EVALUATION, library_root, read_modules, training_files
from trimfit.checkpoints import Checkpoint
from trimfit.demo.run import WINDOW, model_path


@pytest.fixture(scope="module")
def embedded() -> Checkpoint:
    return load_checkpoint(str(model_path()))


def test_lies_inside_the_package_and_is_small() -> None:
    import trimfit

    assert model_path().is_relative_to(Path(trimfit.__file__).parent)
    assert sum(path.stat().st_size for path in model_path().rglob("*") if path.is_file()) <= 12 * 2**20


def test_is_a_plain_hugging_face_directory() -> None:
    names = {path.name for path in model_path().iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if name.endswith((".py", ".bin", ".part"))]


def test_architecture(embedded: Checkpoint) -> None:
    config = json.loads((model_path() / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["hidden_size"] >= 256
    assert config["num_hidden_layers"] >= 6
    assert config["num_key_value_heads"] < config["num_attention_heads"]  # grouped queries
    assert config["hidden_act"] == "silu"
    assert embedded.model.dtype == torch.bfloat16
    gate = embedded.model.get_submodule("model.layers.0.mlp.gate_proj")
    assert gate.get_parameter("weight").shape == (config["intermediate_size"], config["hidden_size"])  # SwiGLU


def test_tokenizer_keeps_every_text(embedded: Checkpoint) -> None:
    for text in ("def f(x):\n\treturn x\r\n", "über 日本 \U0001f600 \x00", "  two  spaces  "):
        ids = embedded.tokenizer(text, add_special_tokens=False).input_ids
        assert embedded.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        assert max(ids) < embedded.model.config.vocab_size


def test_beats_xz(embedded: Checkpoint) -> None:
    """On the text of all evaluation modules, in windows of the model's context."""
    documents = read_modules(EVALUATION)
    text = "".join(documents).encode()
    packed = lzma.compress(text, format=lzma.FORMAT_XZ, preset=9 | lzma.PRESET_EXTREME)
    length = embedded.model.config.max_position_embeddings
    score = score_text(embedded.model, embedded.tokenizer, documents, length=length)
    assert score.bytes == len(text)
    assert score.bits_per_byte < 8 * len(packed) / len(text)


def test_module_lists_are_disjoint() -> None:
    assert len({*CALIBRATION, *EVALUATION}) == len(CALIBRATION) + len(EVALUATION)
    held_out = {library_root() / f"{name}.py" for name in (*CALIBRATION, *EVALUATION)}
    training = list(training_files())
    assert len(training) == len(set(training)) > 100
    assert held_out.isdisjoint(training)
    assert {path.resolve() for path in held_out}.isdisjoint(path.resolve() for path in training)
    texts = {path.read_bytes() for path in held_out if path.is_file()}
    assert not [path for path in training if path.read_bytes() in texts]  # under another name


def test_training_files_are_programs_of_the_library() -> None:
    for path in training_files():
        assert path.suffix == ".py"
        parts = path.relative_to(library_root()).parts
        assert not {"test", "tests", "site-packages", "dist-packages"}.intersection(parts), path


def test_training_files_leave_out_held_out_modules_of_any_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["zipfile.py", "json/decoder.py", "json/csv.py"]  # the last one is not the module csv
    for name in (*kept, "argparse.py", "difflib.py", "test/test_csv.py", "site-packages/torch.py", "pydoc_data/x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("pass\n")
    monkeypatch.setattr(standard_library, "library_root", lambda: tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in training_files()) == sorted(kept)


def test_missing_module_is_skipped_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in EVALUATION[1:]:
        (tmp_path / f"{name}.py").write_text(f"{name} = 'Größe'\n", encoding="utf-8")
    monkeypatch.setattr(standard_library, "library_root", lambda: tmp_path)
    with caplog.at_level(logging.WARNING, logger="trimfit"):
        texts = read_modules(EVALUATION)
    assert texts == [f"{name} = 'Größe'\n" for name in EVALUATION[1:]]
    assert len(caplog.records) == 1
    assert EVALUATION[0] in caplog.text
    assert "skipped" in caplog.text


def test_library_without_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standard_library, "library_root", lambda: tmp_path)
    with pytest.raises(InputError, match="no source of the standard library"):
        read_modules(CALIBRATION)


def test_calibration_has_enough_windows(embedded: Checkpoint) -> None:
    windows = CalibrationConfig(samples=128, sequence_length=WINDOW).windows(embedded.tokenizer, embedded.model)
    assert windows.shape == (128, WINDOW)
