"""A stream reads what would be loaded, and nothing before it is asked for."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch
from families import EVERYTHING, EXPERT_FAMILIES
from refusals import edit_config
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from trimfit.checkpoints import fingerprint, load_checkpoint
from trimfit.checkpoints.ahead import Ahead
from trimfit.checkpoints.stream import Stream, open_stream
from trimfit.checkpoints.tensor_bytes import fingerprint_of
from trimfit.errors import InputError

CPU = torch.device("cpu")
FIRST = "model.layers.0"


def stream_of(directory: Path | str) -> Stream:
    stream = open_stream(str(directory), CPU)
    assert stream is not None
    return stream


def edit_weights(directory: Path, **changes: Tensor | None) -> None:
    """Changes tensors of a checkpoint in one file, or removes them; `__` in a name is a dot."""
    file = directory / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def make(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast) -> Any:
    def make(name: str = "llama", shard_bytes: int = 10**9, dtype: torch.dtype = torch.float32) -> Path:
        directory = tmp_path / "model"
        (EVERYTHING | EXPERT_FAMILIES)[name].build(dtype=dtype).save_pretrained(directory, max_shard_size=shard_bytes)
        word_tokenizer.save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize("shard_bytes", [5_000, 10**9])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "llama-tied",
        "qwen2",
        "gemma3_text",
        "phi3",
        "opt",
        "bloom",
        "gpt2",
        "gpt_neox",
        "gptj",
        *EXPERT_FAMILIES,
    ],
)
def test_a_stream_is_what_would_be_loaded(make: Any, name: str, shard_bytes: int):
    directory = make(name, shard_bytes, torch.bfloat16)
    loaded, stream = load_checkpoint(str(directory)), stream_of(directory)
    skeleton = stream.checkpoint.model
    assert all(tensor.is_meta for tensor in skeleton.state_dict().values())
    assert (type(skeleton), skeleton.dtype, skeleton.training) == (type(loaded.model), torch.bfloat16, False)
    assert skeleton.config.to_dict() == loaded.model.config.to_dict()
    assert skeleton.generation_config.to_dict() == loaded.model.generation_config.to_dict()
    assert [n for n, _ in skeleton.named_parameters()] == [n for n, _ in loaded.model.named_parameters()]
    read = dict(stream.tensors())
    assert list(read) == sorted(loaded.model.state_dict())
    for tensor_name, tensor in loaded.model.state_dict().items():
        assert read[tensor_name].dtype == tensor.dtype and torch.equal(read[tensor_name], tensor)
    assert fingerprint_of(stream.tensors()) == fingerprint(loaded.model)
    computed = {name: one for name, one in loaded.model.named_buffers() if name not in read}
    assert stream.buffers.keys() == computed.keys()
    for buffer_name, buffer in computed.items():
        assert stream.buffers[buffer_name].dtype == buffer.dtype and torch.equal(stream.buffers[buffer_name], buffer)


def test_a_block_is_there_while_it_is_asked_for(make: Any):
    directory = make("qwen2", 5_000)
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    stream, loaded = stream_of(directory), load_checkpoint(str(directory)).model
    for _ in range(2):
        with stream.loaded(FIRST):
            for name, parameter in stream.checkpoint.model.named_parameters():
                assert parameter.is_meta != name.startswith(f"{FIRST}.")
                if not parameter.is_meta:
                    assert torch.equal(parameter, loaded.get_parameter(name))
                    parameter.detach().zero_()
        assert all(parameter.is_meta for parameter in stream.checkpoint.model.parameters())
    with pytest.raises(KeyboardInterrupt), stream.loaded(FIRST):
        raise KeyboardInterrupt
    assert all(parameter.is_meta for parameter in stream.checkpoint.model.parameters())
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize("name", ["qwen2", "mixtral"])
def test_the_next_block_is_read_while_another_is_there(make: Any, name: str):
    """As for a GPU, whose work the host need not wait for."""
    directory = make(name, 5_000)
    stream, loaded = stream_of(directory), load_checkpoint(str(directory)).model
    assert stream.ahead is None  # on a CPU the system reads ahead by itself
    stream = replace(stream, ahead=Ahead())
    second = "model.layers.1"
    for block in (FIRST, second, FIRST):  # the last of them is not what was read ahead
        with stream.loaded(block, then=second if block == FIRST else "model.layers.2"):
            for parameter_name, parameter in stream.checkpoint.model.get_submodule(block).named_parameters():
                assert torch.equal(parameter, loaded.get_parameter(f"{block}.{parameter_name}"))
    assert all(parameter.is_meta for parameter in stream.checkpoint.model.parameters())


def test_what_fails_in_the_background_is_raised_where_it_is_needed(make: Any):
    directory = make("qwen2", 5_000)
    stream = stream_of(directory)
    for file in directory.glob("*.safetensors"):
        file.rename(file.with_suffix(".gone"))
    ahead, name = Ahead(), f"{FIRST}.mlp.up_proj.weight"
    ahead.begin([name], stream.read)
    with pytest.raises(FileNotFoundError):
        ahead.take(name)


def test_reading_ahead_does_not_wait():
    """And what nobody took is forgotten."""
    go_on, read = Event(), list[str]()

    def slow(name: str) -> Tensor:
        assert go_on.wait(60)
        read.append(name)
        return torch.ones(2)

    ahead = Ahead()
    ahead.begin(["a", "b", "c"], slow)
    ahead.begin(["d"], slow)
    go_on.set()
    taken = ahead.take("d")
    assert taken is not None and torch.equal(taken, torch.ones(2))
    assert ahead.take("d") is None and ahead.take("a") is None
    assert read in (["a", "d"], ["d"])  # b and c were never begun


def test_nothing_is_read_ahead_for_a_run_that_was_stopped(make: Any, monkeypatch: pytest.MonkeyPatch):
    go_on, read = Event(), list[str]()
    stream = replace(stream_of(make("qwen2", 5_000)), ahead=Ahead())

    def slow(name: str) -> Tensor:
        assert go_on.wait(60)
        read.append(name)
        return torch.ones(2)

    with pytest.raises(KeyboardInterrupt), stream.loaded(FIRST):
        assert stream.ahead
        stream.ahead.begin(["a", "b", "c"], slow)
        raise KeyboardInterrupt
    stream.ahead.begin(["d"], slow)
    go_on.set()
    assert stream.ahead.take("d") is not None
    assert read in (["a", "d"], ["d"])


def test_mixed_dtypes_become_those_of_the_model(make: Any):
    """The rest is float32, and so says the config; a norm was stored in bfloat16."""
    directory = make()
    norm = torch.ones(32, dtype=torch.bfloat16)
    edit_weights(directory, model__norm__weight=norm)
    stream = stream_of(directory)
    assert stream.read("model.norm.weight").dtype == torch.float32
    assert fingerprint_of(stream.tensors()) == fingerprint(load_checkpoint(str(directory)).model)


@pytest.mark.parametrize("stored", ["embedding", "head", "both", "different"])
def test_tied_weights_are_read_from_where_they_are(make: Any, stored: str):
    directory = make("llama-tied")
    embedding = EVERYTHING["llama-tied"].build().get_input_embeddings().get_parameter("weight").detach()
    head = {"embedding": None, "different": embedding + 1}.get(stored, embedding.clone())
    edit_weights(directory, lm_head__weight=head)
    if stored == "head":
        edit_weights(directory, model__embed_tokens__weight=None)
    stream, loaded = stream_of(directory), load_checkpoint(str(directory)).model
    skeleton = stream.checkpoint.model
    tied = skeleton.get_parameter("lm_head.weight") is skeleton.get_parameter("model.embed_tokens.weight")
    assert tied == (stored != "different")
    assert fingerprint_of(stream.tensors()) == fingerprint(loaded)


def test_weights_that_the_model_does_not_know_are_told_of(make: Any, caplog: pytest.LogCaptureFixture):
    directory = make()
    edit_weights(directory, more=torch.zeros(3))
    assert "more" not in stream_of(directory).places
    assert f"1 weights of {directory} are unknown to the model and left out, more first" in caplog.text


def test_a_hub_model_is_read_in_its_cache(make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    directory = make(shard_bytes=20_000)
    repository = tmp_path / "cache" / "models--someone--tiny"
    shutil.copytree(directory, repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    stream = stream_of("someone/tiny")
    assert stream.checkpoint.source == "someone/tiny"
    assert {source.file.parent for place in stream.places.values() for source in place.sources} == {
        repository / "snapshots" / "abc"
    }


def lacks_weights(directory: Path) -> None:
    edit_weights(directory, model__norm__weight=None)


def has_other_shapes(directory: Path) -> None:
    edit_config(directory, intermediate_size=40)


def lacks_its_file(directory: Path) -> None:
    (directory / "model.safetensors").unlink()


def is_truncated(directory: Path) -> None:
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def lacks_its_tokenizer(directory: Path) -> None:
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").unlink()


def lacks_its_config(directory: Path) -> None:
    (directory / "config.json").unlink()


@pytest.mark.parametrize(
    "damage", [lacks_weights, has_other_shapes, lacks_its_file, is_truncated, lacks_its_tokenizer, lacks_its_config]
)
def test_damage_is_told_as_by_loading(make: Any, damage: Any):
    """Some of it by the load that has to follow where there can be no stream."""
    directory = make()
    damage(directory)
    with pytest.raises(InputError) as loading:
        load_checkpoint(str(directory))
    with pytest.raises(InputError) as streaming:
        assert open_stream(str(directory), CPU) is None
        load_checkpoint(str(directory))
    assert str(streaming.value) == str(loading.value)


def in_bin_files(directory: Path) -> str:
    torch.save(safetensors.torch.load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()
    return "its weights are not in safetensors files"


def in_a_named_file(directory: Path) -> str:
    shutil.copy(directory / "model.safetensors", directory / "other.safetensors")
    edit_config(directory, transformers_weights="other.safetensors")
    return "its config names the file of its weights"


def in_two_forms(directory: Path) -> str:
    names = safetensors.torch.load_file(directory / "model.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return "it has both model.safetensors and model.safetensors.index.json"


@pytest.mark.parametrize("change", [in_bin_files, in_a_named_file, in_two_forms])
def test_what_cannot_be_streamed_is_loaded(make: Any, change: Any, caplog: pytest.LogCaptureFixture):
    directory = make()
    reason = change(directory)
    with caplog.at_level(logging.INFO, "trimfit"):
        assert open_stream(str(directory), CPU) is None
    assert f"{directory} is loaded as a whole: {reason}" in caplog.text
    assert fingerprint(load_checkpoint(str(directory)).model) == fingerprint(EVERYTHING["llama"].build())


def test_names_without_their_prefix_are_understood(make: Any):
    """As in files that the model without a head has written."""
    directory = make()
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    assert fingerprint_of(stream_of(directory).tensors()) == fingerprint(load_checkpoint(str(directory)).model)


def test_an_expert_that_is_not_there_is_missed(make: Any):
    directory = make("mixtral")
    name = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
    assert name in safetensors.torch.load_file(directory / "model.safetensors")
    edit_weights(directory, **{name: None})
    for read in (load_checkpoint, stream_of):
        with pytest.raises(InputError, match="do not fit together, as when one of several experts is missing"):
            read(str(directory))
