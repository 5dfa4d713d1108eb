"""Quantized checkpoints: what is packed is unpacked bit for bit, by us and by those who load it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from compressed_tensors.compressors import PackedQuantizationCompressor, pack_to_int32
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from families import EVERYTHING, windows
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from trimfit.checkpoints.atomic import atomic_directory
from trimfit.checkpoints.packed import (
    BlockPacker,
    check_packable,
    finish_packed,
    packed_tensors,
    plain_tensors,
    quantization_config,
    unpack,
)
from trimfit.checkpoints.shard_writer import ShardWriter
from trimfit.errors import InputError, RunError
from trimfit.quant.grid import Grid, Quantized

WIDTH = 172  # no multiple of what fits in 32 bits, nor of 8


def random_quantized(grid: Grid, out: int, width: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = width // (grid.group_size or width)
    codes = torch.randint(0, 2**grid.bits, (out, width), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(out, groups, generator=generator) + 0.1).div(2**grid.bits).to(dtype)
    zero = torch.randint(0, 2**grid.bits, (out, groups), generator=generator, dtype=torch.uint8)
    return Quantized(codes, scale, torch.full_like(zero, grid.middle) if grid.symmetric else zero, grid)


@st.composite
def quantized(draw: st.DrawFn) -> Quantized:
    group = draw(st.none() | st.integers(1, 70))
    width = draw(st.integers(1, 70)) if group is None else group * draw(st.integers(1, 5))
    grid = Grid(draw(st.integers(2, 8)), group, draw(st.booleans()))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    return random_quantized(grid, draw(st.integers(1, 140)), width, dtype, draw(st.integers(0, 2**31)))


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


@given(quantized())
@settings(deadline=None, max_examples=100)
def test_what_is_packed_is_unpacked_bit_for_bit(given: Quantized):
    tensors = packed_tensors("a.b", given)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    found = unpack("a.b", tensors, given.grid)
    assert same(found.codes, given.codes) and same(found.scale, given.scale)
    assert same(found.zero_point, given.zero_point) and found.grid == given.grid


@given(quantized())
@settings(deadline=None, max_examples=100)
def test_the_library_reads_the_same_weights(given: Quantized):
    """The decompression that transformers runs, with the scheme as our config gives it."""
    assume(given.grid.bits != 4 or len(given.codes) > 8)  # of one packed row, the library cannot read the zero points
    config = QuantizationConfig.model_validate(quantization_config({"a": given.grid}, []))
    (scheme,) = config.config_groups.values()
    assert isinstance(scheme, QuantizationScheme) and PackedQuantizationCompressor.can_compress(nn.Linear, scheme)
    local = {name.removeprefix("a."): tensor for name, tensor in packed_tensors("a", given).items()}
    assert set(local) == set(PackedQuantizationCompressor.compression_param_names(scheme))
    weight = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
    assert same(weight, given.dequantize())


@given(quantized())
@settings(deadline=None, max_examples=50)
def test_the_layout_is_the_documented_one(given: Quantized):
    """Code j of a row is in its bits j·b … j·b + b − 1, counted from the lowest bit of the first word."""
    bits = given.grid.bits
    tensors = packed_tensors("a", given)
    assert tensors["a.weight_shape"].tolist() == list(given.codes.shape)

    def read(words: Tensor, count: int) -> list[int]:
        assert words.dtype == torch.int32 and len(words) == -(-count * bits // 32)
        number = sum((word % 2**32) << (32 * i) for i, word in enumerate(words.tolist()))
        assert number >> (count * bits) == 0
        return [(number >> (bits * j)) % 2**bits for j in range(count)]

    for row, codes in zip(tensors["a.weight_packed"], given.codes, strict=True):
        assert read(row, len(codes)) == codes.tolist()
    if not given.grid.symmetric:
        for column, codes in zip(tensors["a.weight_zero_point"].T, given.zero_point.T, strict=True):
            assert read(column, len(codes)) == codes.tolist()
    assert ("a.weight_zero_point" in tensors) != given.grid.symmetric


def test_a_zero_point_that_would_be_lost_is_refused():
    asymmetric = random_quantized(Grid(4, None), 3, 8)
    with pytest.raises(InputError, match="grid of a is symmetric, but not all of its zero points are 8"):
        packed_tensors("a", Quantized(asymmetric.codes, asymmetric.scale, asymmetric.zero_point, Grid(4, None, True)))


def test_one_grid_is_for_the_class():
    config = quantization_config({"a.q": Grid(3, 128), "a.k": Grid(3, 128)}, ["lm_head"])
    assert config["config_groups"] == {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 3,
                "type": "int",
                "symmetric": False,
                "strategy": "group",
                "group_size": 128,
                "dynamic": False,
            },
            "format": "pack-quantized",
        }
    }
    assert config["ignore"] == ["lm_head"]
    assert config["quant_method"] == "compressed-tensors" and config["quantization_status"] == "compressed"
    assert config["format"] == "pack-quantized"
    assert not {"sparsity_config", "kv_cache_scheme", "transform_config"} & set(config)
    json.dumps(config, allow_nan=False)


def test_several_grids_are_for_names():
    layers = {"a.q": Grid(4, 32, True), "a.d": Grid(4, None, True), "b.q": Grid(4, 32, True)}
    groups = quantization_config(layers, [])["config_groups"]
    found = [(g["targets"], g["weights"]["strategy"], g["weights"]["group_size"]) for g in groups.values()]
    assert found == [(["a.q", "b.q"], "group", 32), (["a.d"], "channel", None)]
    assert all(group["weights"]["symmetric"] for group in groups.values())


def test_a_config_for_nothing_is_refused():
    with pytest.raises(InputError, match="no layer is quantized"):
        quantization_config({}, ["lm_head"])


def linear_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All but the output embedding, as the pipelines quantize."""
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}


def quantize(model: PreTrainedModel, grids: Mapping[str, Grid]) -> dict[str, Quantized]:
    """Random codes, put into the model as well."""
    done: dict[str, Quantized] = {}
    for seed, (name, grid) in enumerate(grids.items()):
        weight = model.get_submodule(name).get_parameter("weight")
        done[name] = random_quantized(grid, *weight.shape, dtype=weight.dtype, seed=seed)
        with torch.no_grad():
            weight.copy_(done[name].dequantize())
    return done


def write(model: PreTrainedModel, done: Mapping[str, Quantized], out: Path, shard_bytes: int = 10**9) -> None:
    """As a pipeline does."""
    out.mkdir()
    writer = ShardWriter(out, shard_bytes)
    for name, layer in done.items():
        writer.add(packed_tensors(name, layer))
    writer.add(plain_tensors(model, done))
    writer.finish()
    finish_packed(model, {name: layer.grid for name, layer in done.items()}, out)


def assert_loads_equal(model: PreTrainedModel, out: Path) -> PreTrainedModel:
    loaded, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert loaded.dtype == model.dtype
    with torch.no_grad():
        assert same(loaded(windows(2)).logits, model(windows(2)).logits)
    return loaded


def assert_is_packed(model: PreTrainedModel, layers: Mapping[str, Any]) -> None:
    """That there was something to decompress: before the first forward pass there are no dense weights."""
    for name in layers:
        parameters = dict(model.get_submodule(name).named_parameters())
        assert "weight_packed" in parameters and "weight" not in parameters


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_grid_in_one_model(tmp_path: Path, dtype: torch.dtype):
    """2 to 8 bits, symmetric and not, in groups of several sizes and without: each layer has a grid of its own."""
    model = EVERYTHING["llama"].build(intermediate_size=WIDTH, dtype=dtype)
    kinds = [(bits, symmetric) for bits in range(2, 9) for symmetric in (True, False)]
    grids: dict[str, Grid] = {}
    for (name, layer), (bits, symmetric) in zip(linear_layers(model).items(), kinds, strict=True):
        sizes = (43, 4, None) if layer.in_features == WIDTH else (16, None, 8)
        grids[name] = Grid(bits, sizes[bits % 3], symmetric)
    write(model, quantize(model, grids), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == len(kinds)
    assert_is_packed(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), grids)
    assert_loads_equal(model, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group"), [(3, None), (3, 4), (4, 4), (8, None)])
def test_one_grid_for_all_layers(tmp_path: Path, bits: int, group: int | None, symmetric: bool, dtype: torch.dtype):
    model = EVERYTHING["llama"].build(intermediate_size=WIDTH, dtype=dtype)
    done = quantize(model, dict.fromkeys(linear_layers(model), Grid(bits, group, symmetric)))
    write(model, done, tmp_path / "out", shard_bytes=12_000)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"] and config["ignore"] == ["lm_head"]
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_loads_equal(model, tmp_path / "out")


@pytest.mark.parametrize(
    "name", ["llama-tied", "llama-biases", "qwen2", "qwen3", "gemma2", "gemma3_text", "opt", "phi3"]
)
def test_families(tmp_path: Path, name: str):
    model = EVERYTHING[name].build(dtype=torch.bfloat16)
    done = quantize(model, dict.fromkeys(linear_layers(model), Grid(4, 8)))
    write(model, done, tmp_path / "out", shard_bytes=12_000)
    loaded = assert_loads_equal(model, tmp_path / "out")
    ties = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, loaded)]
    assert ties[0] == ties[1] and ties[0] == ("lm_head.weight" not in stored(tmp_path / "out"))


def stored(out: Path) -> dict[str, Tensor]:
    files = [safetensors.torch.load_file(file) for file in out.glob("*.safetensors")]
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    assert len(tensors) == sum(len(file) for file in files)
    return tensors


def test_some_layers_only(tmp_path: Path):
    """Attention in the second block: all else is named as not quantized, and stays what it is."""
    model = EVERYTHING["llama"].build()
    names = [name for name in linear_layers(model) if "1.self_attn" in name]
    write(model, quantize(model, dict.fromkeys(names, Grid(4, 8))), tmp_path / "out")
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert set(ignored) == {"lm_head", *linear_layers(model)} - set(names) and len(names) == 4
    assert_loads_equal(model, tmp_path / "out")


def test_the_output_embedding_can_be_quantized(tmp_path: Path):
    model = EVERYTHING["llama"].build()
    names = [*linear_layers(model), "lm_head"]
    write(model, quantize(model, dict.fromkeys(names, Grid(8, 8))), tmp_path / "out")
    assert_loads_equal(model, tmp_path / "out")


def test_a_skeleton_without_weights_is_enough(tmp_path: Path):
    """Blocks written one by one, then the rest; the model that gives the names has no weights of its own."""
    model = EVERYTHING["llama-tied"].build(dtype=torch.bfloat16)
    done = quantize(model, dict.fromkeys(linear_layers(model), Grid(3, 4)))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(model.config)
    skeleton.generation_config = model.generation_config
    with atomic_directory(tmp_path / "out", overwrite=False) as beside:
        writer, plain = ShardWriter(beside, 10_000), plain_tensors(model, done)
        for prefix in ("model.layers.0.", "model.layers.1."):
            writer.add({name: tensor for name, tensor in plain.items() if name.startswith(prefix)})
            for name in (name for name in done if name.startswith(prefix)):
                writer.add(packed_tensors(name, done[name]))
        writer.add({name: tensor for name, tensor in plain.items() if ".layers." not in name})
        writer.finish()
        finish_packed(skeleton, {name: layer.grid for name, layer in done.items()}, beside)
    assert_loads_equal(model, tmp_path / "out")


def test_the_model_is_left_as_it_was(tmp_path: Path):
    model = EVERYTHING["llama"].build(dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5, eos_token_id=[2, 3])  # has no sense
    done = quantize(model, dict.fromkeys(linear_layers(model), Grid(4, 8)))
    model.config.dtype = torch.float32  # out of date: the weights are something else
    config, weights = model.config.to_dict(), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(model, done, tmp_path / "out")
    assert model.config.to_dict() == config and not hasattr(model.config, "quantization_config")
    assert all(same(tensor, weights[name]) for name, tensor in model.state_dict().items())
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["architectures"] == ["LlamaForCausalLM"] and written["dtype"] == "bfloat16"
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (generation["temperature"], generation["eos_token_id"]) == (0.5, [2, 3])


def test_the_size_is_that_of_the_codes(tmp_path: Path):
    """3 bits and a float32 scale for each row, and nothing dense beside."""
    model = EVERYTHING["llama"].build()
    done = quantize(model, dict.fromkeys(linear_layers(model), Grid(3, None, True)))
    write(model, done, tmp_path / "out")
    packed = {name: tensor for name, tensor in stored(tmp_path / "out").items() if ".weight_" in name}
    expected = sum(m.out_features * (-(-m.in_features * 3 // 32) * 4 + 4) + 16 for m in linear_layers(model).values())
    assert sum(tensor.nbytes for tensor in packed.values()) == expected
    assert not {f"{name}.weight" for name in done} & set(stored(tmp_path / "out"))


@pytest.mark.parametrize(
    "lost", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight_zero_point", "lm_head.weight"]
)
def test_a_missing_weight_is_noticed(tmp_path: Path, lost: str):
    model = EVERYTHING["llama"].build()
    done = quantize(model, dict.fromkeys(linear_layers(model), Grid(4, 8)))
    tensors = plain_tensors(model, done)
    for name, layer in done.items():
        tensors |= packed_tensors(name, layer)
    del tensors[lost]
    writer = ShardWriter(tmp_path)
    writer.add(tensors)
    writer.finish()
    with pytest.raises(RunError, match=f"{lost} is missing from the quantized checkpoint"):
        finish_packed(model, {name: layer.grid for name, layer in done.items()}, tmp_path)
    assert not (tmp_path / "config.json").exists()


def test_an_unknown_weight_is_noticed(tmp_path: Path):
    model = EVERYTHING["llama"].build()
    done = quantize(model, dict.fromkeys(linear_layers(model), Grid(4, 8)))
    write(model, done, tmp_path / "out")
    grids = {name: layer.grid for name, layer in done.items()}
    grids["model.layers.0.mlp.up_proj"] = Grid(4, 8, symmetric=True)
    with pytest.raises(RunError, match=r"0.mlp.up_proj.weight_zero_point is unknown to the quantized checkpoint"):
        finish_packed(model, grids, tmp_path / "out")


def test_scales_that_would_be_rounded_are_noticed(tmp_path: Path):
    model = EVERYTHING["llama"].build(dtype=torch.bfloat16)
    grids = dict.fromkeys(linear_layers(model), Grid(4, 8))
    done = {name: random_quantized(grid, *model.get_submodule(name).weight.shape) for name, grid in grids.items()}
    with pytest.raises(RunError, match=r"weight_scale is torch.float32 but the model torch.bfloat16"):
        write(model, done, tmp_path / "out")


def test_a_layer_that_the_format_cannot_hold_is_refused(tmp_path: Path):
    model = EVERYTHING["gpt2"].build()
    name = "transformer.h.0.attn.c_attn"
    with pytest.raises(InputError, match=f"{name} is a Conv1D, but the pack-quantized format"):
        check_packable(model, {name: Grid(4, None)})
    with pytest.raises(InputError, match="Conv1D"):
        finish_packed(model, {name: Grid(4, None)}, tmp_path)


def test_a_layer_that_shares_its_weights_is_refused():
    with pytest.raises(InputError, match="lm_head shares its weights with the embedding"):
        check_packable(EVERYTHING["llama-tied"].build(), {"lm_head": Grid(4, None)})
    check_packable(EVERYTHING["llama"].build(), dict.fromkeys(["lm_head", "model.layers.0.mlp.up_proj"], Grid(4, None)))


def test_a_layer_that_was_packed_wrongly_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = EVERYTHING["llama"].build()
    layer = random_quantized(Grid(4, 8), 32, 32)
    monkeypatch.setattr(
        "trimfit.checkpoints.packed.pack_to_int32", lambda codes, bits, **_: pack_to_int32(codes * 0, bits)
    )
    with pytest.raises(RunError, match=r"0.self_attn.q_proj is not the same after packing; nothing was kept"):
        BlockPacker(model).pack({"model.layers.0.self_attn.q_proj": layer}, {}, {})
