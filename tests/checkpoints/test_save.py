"""What is written loads with plain transformers, is what was asked for, and is proven to be before it appears."""

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from families import ALL_FAMILIES, Family, for_each, windows
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import trimfit.checkpoints.save
from trimfit.checkpoints import SIDECAR, Checkpoint, atomic_directory, load_checkpoint, save_checkpoint
from trimfit.errors import InputError, RunError


def half(checkpoint: Checkpoint) -> dict[str, float]:
    """Sets half of every matrix in the blocks to zero."""
    zeros: dict[str, float] = {}
    with torch.no_grad():
        for name, parameter in checkpoint.model.named_parameters():
            if parameter.dim() == 2 and ".1." in name:
                parameter.view(-1)[::2] = 0
                zeros[name] = 0.5
    assert zeros
    return zeros


def save(checkpoint: Checkpoint, out: Path, *, overwrite: bool = False, **options: Any) -> None:
    defaults: dict[str, Any] = {"sidecar": {"format": 1}, "sparsity": {}}
    with atomic_directory(out, overwrite) as beside:
        save_checkpoint(checkpoint, beside, **defaults | options)


def weight_map(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]


@for_each(ALL_FAMILIES)
def test_it_loads_with_plain_transformers(write: Any, tmp_path: Path, family: Family):
    source = write(family.name)
    checkpoint = load_checkpoint(str(source))
    zeros = half(checkpoint)
    out = tmp_path / "out"
    save(checkpoint, out, sparsity=zeros)

    assert {path.name for path in out.iterdir()} == {path.name for path in source.iterdir()} | {SIDECAR}
    assert json.loads((out / SIDECAR).read_text()) == {"format": 1}
    model, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor)
    for name in zeros:
        assert (model.get_parameter(name).view(-1)[::2] == 0).all()
    with torch.no_grad():
        assert torch.equal(model(windows(2)).logits, checkpoint.model(windows(2)).logits)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.get_vocab() == checkpoint.tokenizer.get_vocab()
    configs = [json.loads((directory / "config.json").read_text()) for directory in (source, out)]
    for config in configs:
        config.pop("attn_config", None)  # MPT's, in which transformers itself writes something new
    assert configs[0] == configs[1]
    stored = [safetensors.torch.load_file(directory / "model.safetensors") for directory in (source, out)]
    assert [(name, t.dtype, t.shape) for name, t in stored[0].items()] == [
        (name, t.dtype, t.shape) for name, t in stored[1].items()
    ]


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt", "bloom"])
def test_tied_embeddings_stay_tied(write: Any, tmp_path: Path, name: str):
    checkpoint = load_checkpoint(str(write(name, tie_word_embeddings=True)))
    save(checkpoint, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_dtype_is_kept(write: Any, tmp_path: Path, dtype: torch.dtype):
    save(load_checkpoint(str(write(dtype=dtype))), tmp_path / "out")
    tensors = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}


@pytest.mark.parametrize("shard_bytes", [1, 5_000, 20_000, 60_000])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_the_shards_are_those_of_the_source(write: Any, tmp_path: Path, shard_bytes: int, name: str):
    source = write(name, shard_bytes=shard_bytes)
    save(load_checkpoint(str(source)), tmp_path / "out")
    assert weight_map(tmp_path / "out") == weight_map(source)
    assert len(set(weight_map(source).values())) > 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in source.iterdir()} | {SIDECAR}
    for shard in source.glob("*.safetensors"):
        old = safetensors.torch.load_file(shard)
        new = safetensors.torch.load_file(tmp_path / "out" / shard.name)
        assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


def test_a_weight_that_the_source_splits_otherwise_is_not_lost(write: Any, tmp_path: Path):
    """The last shard takes what has no place of its own."""
    source = write(shard_bytes=20_000)
    index = source / "model.safetensors.index.json"
    checkpoint = load_checkpoint(str(source))
    content = json.loads(index.read_text())
    del content["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(content))
    save(checkpoint, tmp_path / "out")
    last = sorted(source.glob("*.safetensors"))[-1].name
    assert weight_map(tmp_path / "out") == content["weight_map"] | {"model.norm.weight": last}


def test_the_shards_of_a_hub_model_are_found_in_its_cache(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = write(shard_bytes=20_000)
    cache = tmp_path / "cache"
    repository = cache / "models--someone--tiny"
    shutil.copytree(source, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    checkpoint = load_checkpoint("someone/tiny")
    assert checkpoint.source == "someone/tiny"
    save(checkpoint, tmp_path / "out")
    assert weight_map(tmp_path / "out") == weight_map(source)


def test_a_model_from_nowhere_is_written_in_one_file(write: Any, tmp_path: Path):
    loaded = load_checkpoint(str(write(shard_bytes=20_000)))
    save(Checkpoint("nowhere", loaded.model, loaded.tokenizer), tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_the_same_bytes_twice(write: Any, tmp_path: Path):
    checkpoint = load_checkpoint(str(write(shard_bytes=20_000)))
    for out in (tmp_path / "a", tmp_path / "b"):
        save(checkpoint, out)
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab"]
    assert files[0] == files[1]


def test_the_generation_config_is_kept(write: Any, tmp_path: Path):
    source = write()
    GenerationConfig(do_sample=True, temperature=0.6, max_length=99).save_pretrained(source)
    save(load_checkpoint(str(source)), tmp_path / "out")
    written = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (written.do_sample, written.temperature, written.max_length) == (True, 0.6, 99)


def test_a_generation_config_that_transformers_would_not_save_is_kept(write: Any, tmp_path: Path):
    """As Llama 2's first one: a temperature, but no sampling."""
    source = write()
    (source / "generation_config.json").write_text('{"temperature": 0.9, "top_p": 0.6, "eos_token_id": 2}')
    checkpoint = load_checkpoint(str(source))
    save(checkpoint, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (written["temperature"], written["top_p"], written["eos_token_id"]) == (0.9, 0.6, 2)
    assert checkpoint.model.generation_config.temperature == 0.9


def test_a_chat_template_is_kept(write: Any, tmp_path: Path):
    source = write()
    checkpoint = load_checkpoint(str(source))
    checkpoint.tokenizer.chat_template = "{{ messages }}"
    save(checkpoint, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ messages }}"


def test_an_existing_output_is_refused_and_overwritten_when_asked(write: Any, tmp_path: Path):
    checkpoint = load_checkpoint(str(write()))
    out = tmp_path / "out"
    out.mkdir()
    (out / "trimfit.json").write_text("{}")
    (out / "mine").write_text("")
    with pytest.raises(InputError, match="exists already"):
        save(checkpoint, out)
    assert {path.name for path in out.iterdir()} == {"trimfit.json", "mine"}
    save(checkpoint, out, overwrite=True)
    assert not (out / "mine").exists()
    assert (out / "model.safetensors").exists()


def test_the_source_itself_can_be_overwritten(write: Any):
    """Its weights were read before it goes."""
    source = write(shard_bytes=20_000)
    checkpoint = load_checkpoint(str(source))
    shards = weight_map(source)
    zeros = half(checkpoint)
    (source / "trimfit.json").write_text("{}")
    save(checkpoint, source, sparsity=zeros, overwrite=True)
    assert weight_map(source) == shards
    loaded = load_checkpoint(str(source)).model.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in checkpoint.model.state_dict().items())


def left(tmp_path: Path) -> set[str]:
    return {path.name for path in tmp_path.iterdir()} - {"models"}


def test_a_corrupted_write_is_caught(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = load_checkpoint(str(write()))
    plain = type(checkpoint.model).save_pretrained

    def corrupt(self: Any, directory: Path, **options: Any) -> None:
        plain(self, directory, **options)
        weights = Path(directory) / "model.safetensors"
        data = bytearray(weights.read_bytes())
        data[-5] ^= 1  # one bit
        weights.write_bytes(data)

    monkeypatch.setattr(type(checkpoint.model), "save_pretrained", corrupt)
    with pytest.raises(RunError, match=r"weight is not the same after saving and loading; nothing was kept"):
        save(checkpoint, tmp_path / "out")
    assert left(tmp_path) == set()


def test_zeros_are_counted(write: Any, tmp_path: Path):
    checkpoint = load_checkpoint(str(write()))
    zeros = half(checkpoint)
    name = next(iter(zeros))
    with torch.no_grad():
        checkpoint.model.get_parameter(name).view(-1)[0] = 1.0  # one zero too few
    total = checkpoint.model.get_parameter(name).numel()
    message = rf"{name} has {total // 2 - 1} zeros of {total} instead of 50\.00%; nothing was kept"
    with pytest.raises(RunError, match=message):
        save(checkpoint, tmp_path / "out", sparsity=zeros)
    assert left(tmp_path) == set()


def test_a_weight_that_is_not_written_is_caught(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = load_checkpoint(str(write()))
    plain = AutoModelForCausalLM.from_pretrained

    class Loader:
        @staticmethod
        def from_pretrained(directory: Path, **options: Any) -> Any:
            model = plain(directory, **options)
            del model.model.layers[1]
            return model

    monkeypatch.setattr(trimfit.checkpoints.save, "AutoModelForCausalLM", Loader)
    with pytest.raises(RunError, match=r"model\.layers\.1\..* is not the same after saving and loading"):
        save(checkpoint, tmp_path / "out")
    assert left(tmp_path) == set()


def test_too_little_space_is_seen_before_writing(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoint = load_checkpoint(str(write()))
    usage = shutil._ntuple_diskusage(2**40, 2**40, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(type(checkpoint.model), "save_pretrained", lambda *_, **__: pytest.fail("wrote"))
    with pytest.raises(RunError, match=r"has 0 MiB free but the model needs 0 MiB; free space there or choose"):
        save(checkpoint, tmp_path / "out")
    assert left(tmp_path) == set()


@pytest.mark.parametrize("when", ["weights", "tokenizer"])
def test_a_disk_that_fills_up(write: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str):
    checkpoint = load_checkpoint(str(write()))

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    owner = checkpoint.model if when == "weights" else checkpoint.tokenizer
    monkeypatch.setattr(type(owner), "save_pretrained", full)
    with pytest.raises(RunError, match=f"the disk is full: {tmp_path / 'out'} was not written"):
        save(checkpoint, tmp_path / "out")
    assert left(tmp_path) == set()


def test_numbers_that_json_does_not_know_are_never_written(write: Any, tmp_path: Path):
    checkpoint = load_checkpoint(str(write()))
    with pytest.raises(ValueError, match="JSON"):
        save(checkpoint, tmp_path / "out", sidecar={"error": float("nan")})
    assert left(tmp_path) == set()
