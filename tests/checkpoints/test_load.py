"""What can be loaded is loaded as it is; for anything else one sentence says what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, FAMILIES, make_word_tokenizer, windows
from refusals import edit_config
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from trimfit.checkpoints import fingerprint, load_checkpoint, resolve_device
from trimfit.errors import InputError


def message(directory: Path | str) -> str:
    """Of the error, without the directory's own name."""
    with pytest.raises(InputError) as error:
        load_checkpoint(str(directory))
    text = str(error.value)
    assert "\n" not in text
    return text.replace(str(directory), "MODEL")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_keep_their_dtype(write: Any, dtype: torch.dtype):
    directory = write(dtype=dtype)
    checkpoint = load_checkpoint(str(directory))
    assert checkpoint.source == str(directory)
    assert checkpoint.model.dtype == dtype
    assert not checkpoint.model.training
    assert len(checkpoint.tokenizer) == 64
    expected = FAMILIES["llama"].build(dtype=dtype).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in checkpoint.model.state_dict().items())


def test_shards_are_put_together(write: Any):
    one = load_checkpoint(str(write())).model
    many = load_checkpoint(str(write(shard_bytes=20_000))).model
    assert fingerprint(one) == fingerprint(many)


def test_a_fingerprint_tells_weights_apart(write: Any):
    model = FAMILIES["gpt2"].build()
    before = fingerprint(model)
    assert before == fingerprint(FAMILIES["gpt2"].build())
    with torch.no_grad():
        model.get_parameter("transformer.h.1.mlp.c_fc.bias")[3] += 1e-6
    assert fingerprint(model) != before
    assert fingerprint(FAMILIES["gpt2"].build().bfloat16()) != before


def test_no_such_directory(tmp_path: Path):
    assert message(tmp_path / "none") == "there is no model directory MODEL"
    assert message("./none") == "there is no model directory MODEL"
    assert message("a/b/c") == "there is no model directory MODEL"


def test_a_file(tmp_path: Path):
    (tmp_path / "model.safetensors").write_text("")
    assert message(tmp_path / "model.safetensors") == "MODEL is a file; give the model's directory"


def test_no_config(write: Any):
    directory = write()
    (directory / "config.json").unlink()
    assert message(directory) == "MODEL has no config.json, so it is not a Hugging Face model directory"


def test_a_damaged_config(write: Any):
    directory = write()
    (directory / "config.json").write_text('{"model_type": "lla')
    assert message(directory).startswith("the config of MODEL cannot be read: ")


def test_an_unknown_type(write: Any):
    directory = write()
    edit_config(directory, model_type="llamalike")
    assert message(directory).startswith("the config of MODEL cannot be read: ")


def test_weights_that_are_integers(write: Any):
    directory = write()
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    save_file(tensors | {name: (tensors[name] * 100).to(torch.int8)}, directory / "model.safetensors", {"format": "pt"})
    assert message(directory).startswith(f"{name} of MODEL is stored as I8 and not in floating point: ")


def test_no_weights(write: Any):
    directory = write()
    (directory / "model.safetensors").unlink()
    expected = (
        "MODEL has no weights (model.safetensors or model.safetensors.index.json): "
        "the download is incomplete, fetch it again"
    )
    assert message(directory) == expected
    (directory / "model-00001-of-00002.safetensors").write_text("")  # shards without their index
    assert message(directory) == expected


@pytest.mark.parametrize("size", [0, 4, 1000, -1])
def test_a_truncated_file(write: Any, size: int):
    directory = write()
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    text = message(directory)
    assert text.startswith("MODEL/model.safetensors is truncated or damaged (")
    assert text.endswith("): download it again")


def test_a_truncated_shard(write: Any):
    directory = write(shard_bytes=20_000)
    shard = sorted(directory.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert message(directory).startswith(f"MODEL/{shard.name} is truncated or damaged (")


def test_a_missing_shard(write: Any):
    directory = write(shard_bytes=20_000)
    shard = sorted(directory.glob("*.safetensors"))[1]
    shard.unlink()
    assert message(directory) == f"MODEL lacks the shard {shard.name}: the download is incomplete, fetch it again"


@pytest.mark.parametrize("text", ["", "[]", '{"weight_map": 3}', '{"weight_map": null}'])
def test_a_damaged_index(write: Any, text: str):
    directory = write(shard_bytes=20_000)
    (directory / "model.safetensors.index.json").write_text(text)
    assert message(directory) == "MODEL/model.safetensors.index.json is damaged: download the model again"


def test_weights_that_are_missing(write: Any):
    directory = write()
    edit_config(directory, num_hidden_layers=3)
    assert message(directory) == (
        "the checkpoint MODEL lacks 9 weights, model.layers.2.input_layernorm.weight first: the download is "
        "incomplete or config.json belongs to another model"
    )


def test_weights_of_another_shape(write: Any):
    directory = write()
    edit_config(directory, intermediate_size=40)
    assert message(directory) == (
        "weights of MODEL have other shapes than config.json says, model.layers.0.mlp.down_proj.weight first"
    )


def test_weights_that_the_model_does_not_know_are_told_of(write: Any, caplog: pytest.LogCaptureFixture):
    directory = write()
    edit_config(directory, num_hidden_layers=1)
    load_checkpoint(str(directory))
    assert (
        f"9 weights of {directory} are unknown to the model and left out, model.layers.1.input_layernorm.weight first"
    ) in caplog.text


_SMALL = FAMILIES["llama"].options
_OTHERS: dict[str, Any] = {
    "BertForMaskedLM": lambda: BertForMaskedLM(BertConfig(**_SMALL)),
    "BertModel": lambda: BertModel(BertConfig(**_SMALL)),
    "ViTForImageClassification": lambda: ViTForImageClassification(ViTConfig(**_SMALL, image_size=32, patch_size=16)),
    "T5ForConditionalGeneration": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
}


@pytest.mark.parametrize("name", _OTHERS)
def test_models_that_are_no_causal_lm(tmp_path: Path, name: str):
    model: PreTrainedModel = _OTHERS[name]()
    model.save_pretrained(tmp_path / "other")
    assert message(tmp_path / "other") == (
        f"MODEL is a {name}, not a decoder-only language model (AutoModelForCausalLM)"
    )


def test_a_quantized_model(write: Any):
    directory = write()
    edit_config(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert message(directory) == "MODEL is quantized already; start from the full-precision model"


def test_a_model_that_others_quantized(write: Any):
    directory = write()
    edit_config(directory, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(InputError, match="is quantized by bitsandbytes; trimfit reads what it writes itself"):
        load_checkpoint(str(directory), quantized=True)
    assert load_checkpoint(str(write("gpt2")), quantized=True).model.dtype == torch.float32


def test_online_transformations_of_the_hub(monkeypatch: pytest.MonkeyPatch):
    config = FAMILIES["llama"].build().config
    config.quantization_config = {"quant_method": "trimfit", "packed": {}, "transforms": {}}
    monkeypatch.setattr("trimfit.checkpoints.load.AutoConfig.from_pretrained", lambda source: config)
    with pytest.raises(InputError, match="somebody/model has online transformations, which are read from a directory"):
        load_checkpoint("somebody/model", quantized=True)


def test_no_tokenizer(write: Any):
    directory = write()
    for file in directory.glob("tokenizer*"):
        file.unlink()
    assert message(directory) == "MODEL has no tokenizer (tokenizer.json): the download is incomplete, fetch it again"


def test_a_damaged_tokenizer(write: Any):
    directory = write()
    (directory / "tokenizer.json").write_text('{"version":')
    assert message(directory).startswith("the tokenizer of MODEL cannot be loaded: ")


def test_the_tokenizer_of_another_model(write: Any):
    directory = write()
    make_word_tokenizer(80).save_pretrained(directory)
    assert message(directory) == (
        "the tokenizer of MODEL has 80 tokens but the model embeds only 64: it belongs to another model"
    )


def test_a_smaller_tokenizer_fits(write: Any):
    """Embeddings are padded to round sizes."""
    directory = write()
    make_word_tokenizer(50).save_pretrained(directory)
    assert len(load_checkpoint(str(directory)).tokenizer) == 50


def test_added_tokens_may_lie_beyond_the_embeddings(write: Any):
    """Gemma 3 1B has a token for images, 262144, and 262144 rows."""
    directory = write()
    tokenizer = make_word_tokenizer(64)
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(directory)
    assert len(load_checkpoint(str(directory)).tokenizer) == 65


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "cuda" if not torch.cuda.is_available() else "cuda:98"])
def test_a_device_that_is_not_there(name: str):
    with pytest.raises(InputError, match=f"the device '{name}' is not available here; use --device auto or cpu"):
        resolve_device(name)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "bloom"])
def test_the_loaded_model_computes_the_same(write: Any, name: str):
    model = load_checkpoint(str(write(name))).model
    with torch.no_grad():
        assert torch.equal(model(windows(2)).logits, ALL_FAMILIES[name].build()(windows(2)).logits)
