"""From a checkpoint on disk to a quantized one: what is loaded again is what `quantize` makes of it in memory."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from families import EVERYTHING, FAMILIES, LENGTH, windows
from refusals import damage_file
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trimfit import (
    CalibrationConfig,
    InputError,
    PruneConfig,
    QuantizeConfig,
    QuantizeReport,
    load_checkpoint,
    prune,
    quantize,
    quantize_checkpoint,
)
from trimfit import load as load_any
from trimfit.checkpoints import fingerprint
from trimfit.checkpoints.packed import unpack
from trimfit.quant import Grid
from trimfit.quant.blocks import BlockTransform

CPU = torch.device("cpu")
PACKABLE = ["llama", "llama-tied", "llama-biases", "qwen2", "qwen3", "gemma3_text", "phi3", "opt", "gpt_neox"]


def config(**options: Any) -> QuantizeConfig:
    return QuantizeConfig.model_validate({"bits": 3, "group_size": 8, "learned_steps": 2, **options})


@pytest.fixture
def calibration(tmp_path: Path) -> CalibrationConfig:
    """Six windows of token ids."""
    path = tmp_path / "tokens.npy"
    numpy.save(path, windows(6).numpy())
    return CalibrationConfig(source=str(path), samples=6, sequence_length=LENGTH)


def save(directory: Path, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> str:
    model.save_pretrained(directory, max_shard_size=30_000)
    tokenizer.save_pretrained(directory)
    return str(directory)


def write(directory: Path, tokenizer: PreTrainedTokenizerFast, name: str = "llama", **options: Any) -> str:
    return save(directory, tokenizer, EVERYTHING[name].build(**options))


def stored(out: Path) -> dict[str, Tensor]:
    files = [safetensors.torch.load_file(file) for file in out.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(windows(2)).logits


def load(out: Path) -> PreTrainedModel:
    """Plain transformers, which must find every weight and know all that it finds."""
    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    return model


def assert_loads_as(expected: PreTrainedModel, out: Path) -> PreTrainedModel:
    model = load(out)
    assert model.dtype == expected.dtype
    assert torch.equal(logits(model), logits(expected))
    return model


# Packed


@pytest.mark.parametrize("name", PACKABLE)
def test_packed_is_the_model_in_memory(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, name: str):
    dtype = torch.bfloat16 if name in ("llama-tied", "qwen2", "gemma3_text") else torch.float32
    source = write(tmp_path / "model", word_tokenizer, name, dtype=dtype)
    asked = config(rounding="nearest" if name == "gemma3_text" else "alternating")
    report = quantize_checkpoint(source, tmp_path / "out", asked, device=CPU)
    expected = EVERYTHING[name].build(dtype=dtype)
    quantize(expected, asked)
    model = assert_loads_as(expected, tmp_path / "out")
    plain = {n for n, _ in expected.named_parameters()} - {f"{record.name}.weight" for record in report.layers}
    for parameter in plain:
        assert torch.equal(model.get_parameter(parameter), expected.get_parameter(parameter)), parameter
    ties = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, expected)]
    assert ties[0] == ties[1]
    assert not any(f"{record.name}.weight" in stored(tmp_path / "out") for record in report.layers)
    told = json.loads((tmp_path / "out" / "config.json").read_text())
    assert told["quantization_config"]["format"] == "pack-quantized"
    assert "sparsity_config" not in told["quantization_config"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_in_every_width(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, bits: int):
    """Symmetric and not, in groups and by the row; 172 inputs, which neither 32 nor the group asked for divides."""
    source = write(tmp_path / "model", word_tokenizer, intermediate_size=172)
    asked = config(
        bits=bits,
        symmetric=bits % 2 == 0,
        group_size=(64, 16, "channel")[bits % 3],
        rounding="nearest",
        transform="none",
    )
    quantize_checkpoint(source, tmp_path / "out", asked, device=CPU)
    expected = FAMILIES["llama"].build(intermediate_size=172)
    quantize(expected, asked)
    assert_loads_as(expected, tmp_path / "out")
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    found = {group["weights"]["group_size"] for group in groups.values()}
    assert found == ({None, 86}, {16, 43}, {None})[bits % 3]


def test_packed_with_ignored_layers(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    source = write(tmp_path / "model", word_tokenizer, dtype=torch.bfloat16)
    asked = config(ignore=("q_proj", "model.layers.1.mlp.*"))
    quantize_checkpoint(source, tmp_path / "out", asked, device=CPU)
    expected, dense = (FAMILIES["llama"].build(dtype=torch.bfloat16) for _ in range(2))
    quantize(expected, asked)
    assert_loads_as(expected, tmp_path / "out")
    tensors = stored(tmp_path / "out")
    kept = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.input_layernorm"]
    for name in (*kept, "model.layers.1.post_attention_layernorm", "model.embed_tokens", "lm_head"):
        assert torch.equal(tensors[f"{name}.weight"], dense.get_parameter(f"{name}.weight")), name


def test_packed_with_calibration(
    tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast
):
    source = write(tmp_path / "model", word_tokenizer, dtype=torch.bfloat16)
    report = quantize_checkpoint(source, tmp_path / "out", config(), calibration, device=CPU)
    expected = FAMILIES["llama"].build(dtype=torch.bfloat16)
    tokens = calibration.windows(word_tokenizer, expected)
    quantize(expected, config(), tokens)
    assert_loads_as(expected, tmp_path / "out")
    sidecar = json.loads((tmp_path / "out" / "trimfit.json").read_text())
    assert CalibrationConfig.model_validate(sidecar["calibration"]) == calibration
    assert sidecar["fingerprints"]["tokens"] == hashlib.sha256(tokens.numpy().tobytes()).hexdigest()
    assert (report.windows, report.window_length) == (6, LENGTH)


@pytest.mark.parametrize(
    ("name", "layer"),
    [("gpt2", r"transformer\.h\.0\.attn\.c_attn is a Conv1D"), ("falcon", r"query_key_value is a FalconLinear")],
)
def test_layers_that_cannot_be_packed_can_be_dense(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, name: str, layer: str
):
    source = write(tmp_path / "model", word_tokenizer, name)
    with pytest.raises(InputError, match=rf"{layer}, .* cannot be packed; --format dense holds the same weights"):
        quantize_checkpoint(source, tmp_path / "out", config(), device=CPU)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}
    quantize_checkpoint(source, tmp_path / "out", config(), format="dense", device=CPU)
    expected = EVERYTHING[name].build()
    quantize(expected, config())
    assert_loads_as(expected, tmp_path / "out")


# Online transformations


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_online_transformations_are_stored_with_the_layers_they_belong_to(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype
):
    """Undone in float32, as `quantize` does it, each gives the weights of the model in memory, bit for bit."""
    source = write(tmp_path / "model", word_tokenizer, dtype=dtype, num_hidden_layers=4)
    asked = config(transform="online", rounding="nearest", block_size=16, learned_steps=0)
    report = quantize_checkpoint(source, tmp_path / "out", asked, device=CPU)
    expected = FAMILIES["llama"].build(dtype=dtype, num_hidden_layers=4)
    quantized = quantize(expected, asked)
    assert quantized.bits_per_weight == report.bits_per_weight
    tensors = stored(tmp_path / "out")
    told = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert set(told["transforms"]) == {record.name for record in report.layers if "online" in record.transform}
    assert len(set(told["transforms"].values())) == 4 * 4
    for name, transform in told["transforms"].items():
        assert tensors[transform].dtype == dtype
        inverse = tensors[transform].float()
        parts = {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[0] == name}
        levels = unpack(name, parts, Grid(3, 8)).dequantize().float()
        weight = BlockTransform(inverse, inverse, "").backward(levels)
        assert torch.equal(weight.to(dtype), expected.get_parameter(f"{name}.weight")), name
    merged = load_any(tmp_path / "out", merged=True).state_dict()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.state_dict().items())


def test_plain_transformers_does_not_take_them_for_weights(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    source = write(tmp_path / "model", word_tokenizer)
    quantize_checkpoint(source, tmp_path / "out", config(transform="online"), device=CPU)
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_online_transformations_multiplied_in(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    source = write(tmp_path / "model", word_tokenizer)
    quantize_checkpoint(source, tmp_path / "out", config(transform="online"), format="dense", device=CPU)
    expected = FAMILIES["llama"].build()
    quantize(expected, config(transform="online"))
    assert_loads_as(expected, tmp_path / "out")


# A pruned model


@pytest.mark.parametrize("form", ["packed", "dense"])
@pytest.mark.parametrize("transform", ["none", "free", "online"])
@pytest.mark.parametrize(("pattern", "calibrated"), [(None, False), ("2:4", True)])
def test_a_pruned_model(
    tmp_path: Path,
    calibration: CalibrationConfig,
    word_tokenizer: PreTrainedTokenizerFast,
    pattern: str | None,
    calibrated: bool,
    transform: str,
    form: Any,
):
    """Every zero is one again after loading, whatever was asked for; plain transformers loads it."""
    model = FAMILIES["llama"].build(dtype=torch.bfloat16)
    prune(model, windows(4), PruneConfig(pattern=pattern, selector="wanda", refit="none"))
    source = save(tmp_path / "model", word_tokenizer, model)
    report = quantize_checkpoint(
        source,
        tmp_path / "out",
        config(transform=transform, rounding="alternating" if calibrated else "nearest"),
        calibration if calibrated else None,
        format=form,
        device=CPU,
    )
    loaded = load(tmp_path / "out")
    logits(loaded)  # packed weights are unpacked by the first forward pass
    for record in report.layers:
        zeros = model.get_parameter(f"{record.name}.weight") == 0
        weight = loaded.get_parameter(f"{record.name}.weight")
        assert zeros.float().mean() == 0.5
        assert (weight[zeros] == 0).all()
        assert record.pruned and record.zeros == pytest.approx((weight == 0).float().mean().item())
        if pattern:
            assert ((weight.reshape(len(weight), -1, 4) != 0).sum(2) <= 2).all()
    assert bool(report.refused) == (transform != "none")
    assert {path.name for path in (tmp_path / "out").glob("trimfit*")} == {"trimfit.json"}


# GGUF


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gguf_is_the_model_in_memory(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype):
    """Read back by transformers; its scales are in float16, also those of rows that nearly died."""
    tokenizer = byte_level(word_tokenizer)
    expected = FAMILIES["llama"].build(intermediate_size=64, vocab_size=300, dtype=dtype)
    with torch.no_grad():
        expected.get_parameter("model.layers.0.mlp.down_proj.weight")[1] *= 1e-7
    source = save(tmp_path / "model", tokenizer, expected)
    asked = config(bits=4, group_size=32, symmetric=True)
    report = quantize_checkpoint(source, tmp_path / "out", asked, format="gguf", device=CPU)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("model.gguf", "trimfit.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    quantize(expected, asked, scale_dtype=torch.float16)
    assert len(report.layers) == 2 * 7
    assert report.bits_per_weight == 4 + 16 / 32
    for name, tensor in expected.state_dict().items():
        found = model.state_dict()[name]
        assert torch.equal(found.to(dtype), tensor), name


def byte_level(template: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer of a kind that a GGUF file can hold, for 300 tokens at most."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["w0", "w1", "w2", *alphabet, "th"])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = {"bos_token": template.bos_token, "eos_token": template.eos_token}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


# What is written, and when


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_no_data_is_drawn_and_nothing_is_run(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, form: Any
):
    source = write(tmp_path / "model", word_tokenizer)
    expected = FAMILIES["llama"].build()
    quantize(expected, config())

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("not without data")

    with monkeypatch.context() as patch:
        patch.setattr("trimfit.pipelines.quantizing.checkpoint.draw_windows", refuse)
        for module in expected.modules():
            if any(True for _ in module.parameters()):
                patch.setattr(type(module), "forward", refuse)
        report = quantize_checkpoint(source, tmp_path / "out", config(), format=form, device=CPU)
    assert_loads_as(expected, tmp_path / "out")
    assert (report.windows, report.window_length) == (0, 0)
    sidecar = json.loads((tmp_path / "out" / "trimfit.json").read_text())
    assert (sidecar["calibration"], sidecar["self_sample"], sidecar["fingerprints"]["tokens"]) == (None, None, None)


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_the_record(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, form: Any):
    source = write(tmp_path / "model", word_tokenizer)
    report = quantize_checkpoint(source, tmp_path / "out", config(), format=form, device=CPU)
    sidecar = json.loads((tmp_path / "out" / "trimfit.json").read_text())
    assert sidecar["format"] == 1
    assert sidecar["source"] == source
    assert sidecar["device"] == "cpu"
    assert sidecar["fingerprints"] == {"model": fingerprint(FAMILIES["llama"].build()), "tokens": None}
    fields = {name: sidecar[name] for name in QuantizeReport.model_fields}
    assert QuantizeReport.model_validate(fields) == report
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(("form", "transform"), [("packed", "free"), ("packed", "online"), ("dense", "free")])
def test_the_same_bytes_twice(
    tmp_path: Path, calibration: CalibrationConfig, word_tokenizer: PreTrainedTokenizerFast, form: Any, transform: str
):
    source = write(tmp_path / "model", word_tokenizer, dtype=torch.bfloat16)
    for out in "ab":
        asked = config(transform=transform)
        quantize_checkpoint(source, tmp_path / out, asked, calibration, format=form, device=CPU)
    files = [{path.name: path.read_bytes() for path in (tmp_path / out).iterdir()} for out in "ab"]
    sidecars = [json.loads(content.pop("trimfit.json")) for content in files]
    assert files[0] == files[1]
    assert sidecars[0]["fingerprints"] == sidecars[1]["fingerprints"]


def test_the_model_writes_its_own_calibration(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    source = write(tmp_path / "model", word_tokenizer)
    calibration = CalibrationConfig(source="self", samples=6, sequence_length=LENGTH)
    report = quantize_checkpoint(source, tmp_path / "out", config(), calibration, device=CPU)
    dense = load_checkpoint(source)
    sample = calibration.draw(dense.tokenizer, dense.model, batch_size=32)[1]
    assert sample is not None
    quantize(dense.model, config(), sample.windows)
    assert_loads_as(dense.model, tmp_path / "out")
    kept = numpy.load(tmp_path / "out" / "calibration.npy")
    assert sorted(kept.tolist()) == sorted(sample.windows.tolist())
    sidecar = json.loads((tmp_path / "out" / "trimfit.json").read_text())
    assert sidecar["self_sample"] == pytest.approx(sample.record())
    assert sidecar["calibration"]["source"] == "self"
    assert (report.windows, report.window_length) == (6, LENGTH)


def test_an_existing_output_is_refused_before_anything_is_read(tmp_path: Path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="out exists already; choose another output or give --overwrite"):
        quantize_checkpoint("./no model", tmp_path / "out", config(), device=CPU)


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_an_existing_output_survives_a_failure(
    tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, form: Any
):
    source = write(tmp_path / "model", word_tokenizer)
    out = tmp_path / "out"
    out.mkdir()
    (out / "trimfit.json").write_text("{}")
    (out / "mine").write_text("old")

    def fail(*arguments: Any, **keywords: Any) -> None:
        raise OSError("at the very end")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", fail)
        with pytest.raises(OSError, match="at the very end"):
            quantize_checkpoint(source, out, config(), format=form, device=CPU, overwrite=True)
    assert (out / "mine").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out", "out.run"}
    assert not (tmp_path / "out.run" / "result").exists()
    quantize_checkpoint(source, out, config(), format=form, device=CPU, overwrite=True)
    assert not (out / "mine").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("out", ["model", "."])
def test_the_model_itself_is_never_replaced(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, out: str):
    source = write(tmp_path / "model", word_tokenizer)
    (tmp_path / "trimfit.json").write_text("{}")  # as if the folder around it were a checkpoint too
    with pytest.raises(InputError, match=r"would destroy the model .* itself; choose another output"):
        quantize_checkpoint(source, tmp_path / out, config(), device=CPU, overwrite=True)
    assert (tmp_path / "model" / "config.json").exists()


@pytest.mark.parametrize("form", ["packed", "dense"])
def test_nan_weights_name_the_layer(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, form: Any):
    source = write(tmp_path / "model", word_tokenizer)
    damage_file(tmp_path / "model", "model.layers.1.self_attn.k_proj.weight", float("nan"))
    with pytest.raises(InputError, match=r"model\.layers\.1\.self_attn\.k_proj\.weight .*has NaN or infinite entries"):
        quantize_checkpoint(source, tmp_path / "out", config(), format=form, device=CPU)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("transform", ["free", "online"])
def test_what_is_quantized_is_no_source(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast, transform: str):
    source = write(tmp_path / "model", word_tokenizer)
    quantize_checkpoint(source, tmp_path / "out", config(transform=transform), device=CPU)
    for form in ("packed", "dense"):
        with pytest.raises(InputError, match="out is quantized already; start from the full-precision model"):
            quantize_checkpoint(str(tmp_path / "out"), tmp_path / "again", config(), format=form, device=CPU)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


def test_scales_are_in_the_dtype_of_the_model(tmp_path: Path, word_tokenizer: PreTrainedTokenizerFast):
    source = write(tmp_path / "model", word_tokenizer, dtype=torch.bfloat16)
    quantize_checkpoint(source, tmp_path / "out", config(), device=CPU)
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        scales = [name for name in set(file.keys()) if name.endswith("weight_scale")]
        assert {file.get_tensor(name).dtype for name in scales} == {torch.bfloat16}
    assert len(scales) == 2 * 7
