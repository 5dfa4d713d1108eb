"""Wrong input: one sentence, the right exit status, nothing left behind."""

import logging
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_helpers import Outcome, is_one_sentence, make_model, make_tokenizer, nothing_but, save_model, trimfit
from refusals import damage
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from trimfit import QuantizeConfig, quantize_checkpoint
from trimfit.cli import show

Here = Callable[..., Outcome]
CPU = torch.device("cpu")
QUANTIZE = "quantize {tiny} -o {out}"
TINY = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@dataclass(frozen=True)
class Bad:
    """A command that must fail: in `options`, names in braces are files and directories of `broken`."""

    options: str
    words: tuple[str, ...]  # of the sentence, that names the culprit
    command: str = "prune {tiny} -o {out} --sequence-length 32 --samples 12"
    status: int = 2

    def arguments(self, places: dict[str, Path], out: Path) -> list[str]:
        known = {name: str(path) for name, path in places.items()}
        return [word.format(out=out, **known) for word in f"{self.command} {self.options}".split()]


@pytest.fixture(scope="session")
def broken(tiny: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By name: a model or a text that is broken in one way, beside those that are not."""
    root = tmp_path_factory.mktemp("broken")
    places = {"tiny": tiny, "text": text, "root": root}

    def add(name: str, path: Path) -> Path:
        places[name] = path
        return path

    def copy(name: str) -> Path:
        return add(name, shutil.copytree(tiny, root / name))

    (copy("no_config") / "config.json").unlink()
    (copy("bad_config") / "config.json").write_text('{"model_type": "lla')
    (copy("no_weights") / "model.safetensors").unlink()
    no_tokenizer = copy("no_tokenizer")
    (no_tokenizer / "tokenizer.json").unlink()
    (no_tokenizer / "tokenizer_config.json").unlink()
    weights = copy("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    lacking = save_model(add("no_shard", root / "no_shard"), shard_size="20KB")
    sorted(lacking.glob("model-*.safetensors"))[-1].unlink()

    old = add("bad_bin", root / "bad_bin")
    make_model().config.save_pretrained(old)
    make_tokenizer().save_pretrained(old)
    torch.save(make_model().state_dict(), old / "pytorch_model.bin")
    (old / "pytorch_model.bin").write_bytes((old / "pytorch_model.bin").read_bytes()[:20000])

    save_model(add("encoder", root / "encoder"), BertForMaskedLM(BertConfig(vocab_size=300, **TINY)))
    ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **TINY)).save_pretrained(
        add("vision", root / "vision")
    )
    save_model(add("small_vocabulary", root / "small_vocabulary"), make_model(vocabulary=200))
    for name, change in {
        "nan": damage("model.layers.1.mlp.down_proj.weight", torch.nan),
        "nan_head": damage("lm_head.weight", torch.nan),
        "infinite": damage("model.norm.weight", torch.inf),
    }.items():
        model = make_model()
        change(model)
        save_model(add(name, root / name), model)

    gpt2 = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=1)
    save_model(add("gpt2", root / "gpt2"), GPT2LMHeadModel(gpt2))
    for name in ("free", "online"):
        config = QuantizeConfig.model_validate({"transform": name, "rounding": "nearest"})
        quantize_checkpoint(str(tiny), add(f"quantized_{name}", root / f"quantized_{name}"), config, device=CPU)

    add("missing", root / "missing")
    add("empty", root / "empty.txt").write_bytes(b"")
    add("blank", root / "blank.txt").write_text(" \n\t\n")
    add("binary", root / "binary.txt").write_bytes(bytes(range(256)) * 64)
    add("latin1", root / "latin1.txt").write_bytes("über ".encode("latin-1") * 500)
    add("short", root / "short.txt").write_text("the cat")
    add("lines", root / "lines.jsonl").write_text('{"body": "the cat sat"}\n')
    add("bad_lines", root / "bad_lines.jsonl").write_text('{"text": "the cat"}\n{"text": \n')
    np.save(add("high_ids", root / "high_ids.npy"), np.arange(4000))
    np.save(add("float_ids", root / "float_ids.npy"), np.zeros(4000))
    return places


MISTAKES = {
    "missing model": Bad("", ("missing",), command="prune {missing} -o {out}"),
    "missing shard": Bad("", ("incomplete", "model-"), command="prune {no_shard} -o {out}"),
    "truncated weights": Bad("", ("model.safetensors", "damaged"), command="prune {truncated} -o {out}"),
    "encoder": Bad("", ("encoder", "BertForMaskedLM", "decoder-only"), command="prune {encoder} -o {out}"),
    "vision model": Bad("", ("vision", "ViTForImage", "decoder-only"), command="prune {vision} -o {out}"),
    "foreign tokenizer": Bad("", ("tokenizer", "300", "200"), command="prune {small_vocabulary} -o {out}"),
    "NaN weights": Bad("", ("model.layers.1.mlp.down_proj", "NaN"), command="prune {nan} -o {out}"),
    "empty text": Bad("--calibration {empty}", ("empty.txt", "is empty")),
    "binary text": Bad("--calibration {binary}", ("binary.txt", "NUL byte")),
    "fewer tokens than a window": Bad("--calibration {short}", ("tokens", "32")),
    "sparsity of one": Bad("--sparsity 1", ("--sparsity", "1.0")),
    "negative sparsity": Bad("--sparsity -0.1", ("--sparsity", "-0.1")),
    "pattern of three": Bad("--pattern 2:3:4", ("2:3:4", "N:M")),
    "pattern that keeps more than there are": Bad("--pattern 5:4", ("5:4",)),
    "existing output": Bad("", ("exists", "--overwrite"), command="prune {tiny} -o {tiny}"),
    "unknown option": Bad("--sparsty 0.5", ("--sparsty", "trimfit prune --help")),
    "empty text to score": Bad("--text {empty}", ("empty.txt", "is empty"), command="eval {tiny}"),
    "no command": Bad("", ("nope", "--help"), command="nope"),
    "no model": Bad("", ("MODEL", "--help"), command="prune -o {out}"),
    "no output": Bad("", ("--output", "--help"), command="prune {tiny}"),
    "no text": Bad("", ("--text", "--help"), command="eval {tiny}"),
    "not a number": Bad("--samples many", ("--samples", "integer")),
    "unknown selector": Bad("--selector best", ("'best'", "wanda", "sparsegpt")),
    "unknown scope": Bad("--scope column", ("--scope", "row", "layer", "column")),
    "unknown solver": Bad("--solver admm", ("--solver", "cholesky", "admm")),
    "unknown refit": Bad("--refit some", ("--refit", "optimal", "some")),
    "unknown capture": Bad("--capture layer", ("--capture", "group", "block")),
    "unknown device": Bad("--device tpu9", ("tpu9", "--device")),
    "sparsity and pattern": Bad("--sparsity 0.5 --pattern 2:4", ("sparsity", "pattern", "both")),
    "sparsity that is no number": Bad("--sparsity nan", ("--sparsity", "nan")),
    "scope of a pattern": Bad("--scope row --pattern 2:4", ("scope", "N:M")),
    "own weights of a selector without": Bad("--selector wanda --refit own", ("wanda", "of its own")),
    "pattern that keeps all": Bad("--pattern 4:4", ("4:4",)),
    "pattern that does not fit": Bad("--pattern 2:5 --calibration {text}", ("model.layers.0.", "2:5", "32")),
    "tolerance of zero": Bad("--tolerance 0", ("--tolerance",)),
    "neither a damping nor auto": Bad("--damping many", ("--damping", "valid number", "or 'auto'", "'many'")),
    "negative damping": Bad("--damping -1", ("--damping", "-1")),
    "infinite damping": Bad("--damping inf --calibration {text}", ("damping", "inf")),
    "all windows held out": Bad("--held-out 1", ("--held-out", "1")),
    "no samples": Bad("--samples 0", ("--samples", "0")),
    "window of one token": Bad("--sequence-length 1", ("--sequence-length", "1")),
    "no batch": Bad("--batch-size 0", ("--batch-size", "0")),
    "ignoring what is not there": Bad("--ignore *.q --calibration {text}", ("'*.q'", "model.layers.0.")),
    "ignoring with a broken expression": Bad("--ignore re:( --calibration {text}", ("re:(",)),
    "ignoring everything": Bad("--ignore re:. --calibration {text}", ("no layer",)),
    "no config": Bad("", ("no_config", "config.json"), command="prune {no_config} -o {out}"),
    "broken config": Bad("", ("bad_config", "config"), command="prune {bad_config} -o {out}"),
    "no weights": Bad("", ("no_weights", "incomplete"), command="prune {no_weights} -o {out}"),
    "no tokenizer": Bad("", ("no_tokenizer", "tokenizer"), command="prune {no_tokenizer} -o {out}"),
    "truncated old weights": Bad("", ("bad_bin",), command="prune {bad_bin} -o {out}"),
    "NaN in the head": Bad("", ("lm_head", "NaN"), command="prune {nan_head} -o {out}"),
    "infinite weights": Bad("", ("model.norm", "infinite"), command="prune {infinite} -o {out}"),
    "file as model": Bad("", ("words.txt", "file"), command="prune {text} -o {out}"),
    "missing text": Bad("--calibration {missing}.txt", ("missing.txt", "no such file")),
    "blank text": Bad("--calibration {blank}", ("blank.txt", "white space")),
    "text in another encoding": Bad("--calibration {latin1}", ("latin1.txt", "UTF-8")),
    "directory as text": Bad("--calibration {root}", ("directory",)),
    "lines without the field": Bad("--calibration {lines}", ("lines.jsonl, line 1", "'text'", "body")),
    "broken lines": Bad("--calibration {bad_lines}", ("bad_lines.jsonl, line 2", "JSON")),
    "ids outside the vocabulary": Bad("--calibration {high_ids}", ("vocabulary", "300")),
    "ids that are no integers": Bad("--calibration {float_ids}", ("float_ids.npy", "integers")),
    "output without parent": Bad("", ("nowhere", "not a directory"), command="prune {tiny} -o {out}/nowhere/out"),
    "file as output": Bad("--overwrite", ("words.txt", "file"), command="prune {tiny} -o {text}"),
    "the model as output": Bad("--overwrite", ("destroy", "tiny"), command="prune {tiny} -o {tiny}"),
    "the model inside the output": Bad("--overwrite", ("destroy", "tiny"), command="prune {tiny} -o {tiny}/.."),
    "one bit": Bad("--bits 1", ("--bits", "2", "1"), command=QUANTIZE),
    "nine bits": Bad("--bits 9", ("--bits", "8", "9"), command=QUANTIZE),
    "bits that are no number": Bad("--bits three", ("--bits", "integer"), command=QUANTIZE),
    "groups of none": Bad("--group-size 0", ("--group-size", "'0'"), command=QUANTIZE),
    "negative groups": Bad("--group-size -64", ("--group-size", "'-64'"), command=QUANTIZE),
    "groups that are no number": Bad("--group-size abc", ("group size", "'channel'", "'abc'"), command=QUANTIZE),
    "huge groups": Bad("--group-size 99999999", ("group size", "'channel'"), command=QUANTIZE),
    "unknown transform": Bad("--transform best", ("--transform", "pairs", "online", "best"), command=QUANTIZE),
    "unknown rounding": Bad("--rounding up", ("--rounding", "nearest", "alternating", "up"), command=QUANTIZE),
    "unknown format": Bad("--format onnx", ("format", "'onnx'", "packed, dense, gguf"), command=QUANTIZE),
    "no transformation blocks": Bad("--block-size 0", ("--block-size", "0"), command=QUANTIZE),
    "negative steps": Bad("--learned-steps -1", ("--learned-steps", "-1"), command=QUANTIZE),
    "large transformation blocks": Bad("--block-size 1000", ("--block-size", "128", "1000"), command=QUANTIZE),
    "negative damping of quantization": Bad("--damping -1", ("--damping", "-1"), command=QUANTIZE),
    "infinite damping of quantization": Bad("--damping inf", ("--damping", "inf"), command=QUANTIZE),
    "quantizing in no batch": Bad("--batch-size 0", ("--batch-size", "0"), command=QUANTIZE),
    "quantizing on an unknown device": Bad("--device tpu9", ("tpu9", "--device"), command=QUANTIZE),
    "quantizing nothing": Bad("--ignore re:.", ("no layer",), command=QUANTIZE),
    "quantizing what is not there": Bad("--ignore *.q", ("'*.q'", "model.layers.0."), command=QUANTIZE),
    "an expression that does not end": Bad("--ignore re:(", ("re:(",), command=QUANTIZE),
    "quantizing without output": Bad("", ("--output", "quantize --help"), command="quantize {tiny}"),
    "quantizing without model": Bad("", ("MODEL", "quantize --help"), command="quantize -o {out}"),
    "quantizing a missing model": Bad("", ("missing",), command="quantize {missing} -o {out}"),
    "quantizing a text": Bad("", ("words.txt", "file"), command="quantize {text} -o {out}"),
    "quantizing an encoder": Bad("", ("BertForMaskedLM", "decoder-only"), command="quantize {encoder} -o {out}"),
    "quantizing what is quantized": Bad(
        "", ("quantized_free", "already", "full-precision"), command="quantize {quantized_free} -o {out}"
    ),
    "quantizing what is transformed": Bad(
        "", ("quantized_online", "already", "full-precision"), command="quantize {quantized_online} -o {out}"
    ),
    "pruning what is quantized": Bad(
        "", ("quantized_free", "already", "full-precision"), command="prune {quantized_free} -o {out}"
    ),
    "quantizing NaN": Bad("", ("model.layers.1.mlp.down_proj", "NaN"), command="quantize {nan} -o {out}"),
    "quantizing NaN densely": Bad(
        "--format dense", ("model.layers.1.mlp.down_proj", "NaN"), command="quantize {nan} -o {out}"
    ),
    "quantizing with infinite norms": Bad("", ("model.norm", "infinite"), command="quantize {infinite} -o {out}"),
    "quantizing half a download": Bad("", ("incomplete", "model-"), command="quantize {no_shard} -o {out}"),
    "quantizing a truncated file": Bad("", ("damaged",), command="quantize {truncated} -o {out}"),
    "packing what cannot be packed": Bad("", ("Conv1D", "--format dense"), command="quantize {gpt2} -o {out}"),
    "GGUF of another family": Bad(
        "--format gguf --symmetric", ("gpt2", "llama, mistral"), command="quantize {gpt2} -o {out}"
    ),
    "GGUF with online transformations": Bad(
        "--format gguf --transform online", ("GGUF", "--format packed"), command=QUANTIZE
    ),
    "GGUF with zero points": Bad("--format gguf", ("GGUF", "--symmetric"), command=QUANTIZE),
    "GGUF of three bits": Bad("--format gguf --symmetric --bits 3", ("GGUF", "4 or 8"), command=QUANTIZE),
    "GGUF of widths that do not fit": Bad(
        "--format gguf --symmetric --group-size 32", ("down_proj", "48", "--ignore"), command=QUANTIZE
    ),
    "quantizing with a missing text": Bad(
        "--calibration {missing}.txt", ("missing.txt", "no such file"), command=QUANTIZE
    ),
    "quantizing with a binary text": Bad("--calibration {binary}", ("binary.txt", "NUL byte"), command=QUANTIZE),
    "quantizing with a short text": Bad(
        "--calibration {short} --sequence-length 32", ("tokens", "32"), command=QUANTIZE
    ),
    "quantizing with other ids": Bad(
        "--calibration {high_ids} --samples 12 --sequence-length 32", ("vocabulary", "300"), command=QUANTIZE
    ),
    "samples of no data": Bad("--samples 4", ("--samples", "--calibration"), command=QUANTIZE),
    "a limit of no data": Bad(
        "--memory-limit 1GB", ("--memory-limit", "does nothing", "--calibration"), command=QUANTIZE
    ),
    "a seed of no data": Bad("--seed 3", ("--seed", "--calibration"), command=QUANTIZE),
    "a field of no data": Bad("--field prose", ("--field", "--calibration"), command=QUANTIZE),
    "blocks of no transformation": Bad("--block-size 32", ("--block-size", "--transform online"), command=QUANTIZE),
    "steps of no transformation": Bad(
        "--transform pairs --learned-steps 7", ("--learned-steps", "--transform online"), command=QUANTIZE
    ),
    "quantizing with no samples": Bad("--calibration {text} --samples 0", ("--samples", "0"), command=QUANTIZE),
    "quantizing over another output": Bad("", ("exists", "--overwrite"), command="quantize {tiny} -o {nan}"),
    "quantizing over the model": Bad("--overwrite", ("destroy", "tiny"), command="quantize {tiny} -o {tiny}"),
    "quantizing over a file": Bad("--overwrite", ("words.txt", "file"), command="quantize {tiny} -o {text}"),
    "scoring with NaN weights": Bad("--text {text}", ("NaN",), command="eval {nan} --window 32", status=1),
    "scoring no window": Bad("--text {text} --limit 0", ("0",), command="eval {tiny} --window 32"),
    "scoring windows of one token": Bad("--text {text} --window 1", ("1",), command="eval {tiny}"),
    "scoring a binary file": Bad("--text {binary}", ("binary.txt", "NUL byte"), command="eval {tiny}"),
    "demo over another directory": Bad("", ("exists", "demo"), command="demo -o {tiny}"),
}


# One for each way to end; the others in this process, for a command spends seconds on imports.
REAL = ("missing model", "truncated weights", "sparsity of one", "unknown option")


@pytest.fixture(scope="session")
def real_runs(
    broken: dict[str, Path], pool: ThreadPoolExecutor, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Path, Future[Outcome]]]:
    """All of REAL through the real command, started in their order; with the parent of the output."""
    runs: dict[str, tuple[Path, Future[Outcome]]] = {}
    for name in REAL:
        parent = tmp_path_factory.mktemp("bad")
        runs[name] = parent, pool.submit(trimfit, *MISTAKES[name].arguments(broken, parent / "out"))
    return runs


def check(bad: Bad, outcome: Outcome, parent: Path) -> None:
    assert outcome.status == bad.status
    assert is_one_sentence(outcome), outcome.stderr
    for word in bad.words:
        assert word.lower() in outcome.stderr.lower(), outcome.stderr
    assert outcome.stdout == ""
    assert nothing_but(parent)


@pytest.mark.parametrize("name", REAL)
def test_real_command(name: str, real_runs: dict[str, tuple[Path, Future[Outcome]]]) -> None:
    parent, run = real_runs[name]
    check(MISTAKES[name], run.result(), parent)


@pytest.mark.parametrize("name", MISTAKES)
def test_in_this_process(name: str, here: Here, broken: dict[str, Path], tmp_path: Path) -> None:
    check(MISTAKES[name], here(*MISTAKES[name].arguments(broken, tmp_path / "out")), tmp_path)


@pytest.mark.parametrize("name", ["unknown selector", "blank text", "scoring with NaN weights", "no config"])
def test_failing_prints_nothing_for_machines(name: str, here: Here, broken: dict[str, Path], tmp_path: Path) -> None:
    check(MISTAKES[name], here(*MISTAKES[name].arguments(broken, tmp_path / "out"), "--json"), tmp_path)


def test_inputs_are_as_they_were(broken: dict[str, Path]) -> None:
    """Runs after all the others: not one of them wrote beside a model or a text."""
    assert nothing_but(broken["tiny"].parent, ["tiny"])
    assert nothing_but(broken["text"].parent, ["words.txt"])
    assert not any(path.name.endswith((".part", ".old")) for path in broken["root"].iterdir())


def test_debug_shows_where(here: Here, broken: dict[str, Path], tmp_path: Path) -> None:
    outcome = here("prune", broken["truncated"], "-o", tmp_path / "out", "--debug")
    assert outcome.status == 2
    assert "Traceback (most recent call last)" in outcome.stderr
    assert "load.py" in outcome.stderr
    last = outcome.stderr.splitlines()[-1]
    assert last.startswith("error: ")
    assert "damaged" in last


def test_errors_of_others_are_one_sentence_too(
    here: Here, broken: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error, word in (
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line (--debug"),
        (ValueError(), "ValueError: no message"),
        (MemoryError(), "--batch-size"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "--batch-size"),
        (EOFError("ended"), "EOFError: ended"),
    ):

        def fail(*arguments: object, error: Exception = error, **options: object) -> None:
            raise error

        monkeypatch.setattr("trimfit.calibration.CalibrationConfig.draw", fail)
        outcome = here("prune", broken["tiny"], "-o", tmp_path / "out")
        assert outcome.status == 1
        sentence = outcome.stderr.splitlines()[-1]
        assert sentence.startswith("error: ")
        assert word in sentence
        assert "second line" not in outcome.stderr
        assert nothing_but(tmp_path)


def test_attempts_to_reach_the_hub_are_not_told():
    """Without a network each of them would be a warning, before the one sentence."""
    show.quiet_libraries()
    assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
