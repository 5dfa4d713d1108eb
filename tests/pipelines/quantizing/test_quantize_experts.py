"""Mixtures of experts: every expert is quantized, on the tokens routed to it where there are any; routers are not."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import EXPERT_FAMILIES, EXPERTS, Family, for_each, make_word_tokenizer, plain_expert_inputs, windows
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimfit import PruneConfig, QuantizeConfig, QuantizeReport, prune, quantize
from trimfit.errors import InputError
from trimfit.pipelines import quantize_checkpoint

PLAIN = QuantizeConfig(bits=3, group_size=16, transform="none")


def weight(model: PreTrainedModel, name: str) -> Tensor:
    """W (out, in) of a layer, written independently of the library."""
    if ".experts." not in name:
        return model.get_parameter(f"{name}.weight").detach()
    owner, expert, last = name.rsplit(".", 2)
    stored = model.get_parameter(f"{owner}.{last}").detach()[int(expert)]
    return stored.T if model.config.model_type == "gpt_oss" else stored


def changed(model: PreTrainedModel, dense: PreTrainedModel) -> set[str]:
    """Names of the tensors that are not bit for bit the same."""
    return {name for name, tensor in dense.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])}


def holding(report: QuantizeReport) -> set[str]:
    """Names of the tensors that hold the weights of the records."""
    names = [record.name for record in report.layers]
    experts = {".".join(np.delete(name.split("."), -2)) for name in names if ".experts." in name}
    return experts | {f"{name}.weight" for name in names if ".experts." not in name}


@for_each(EXPERT_FAMILIES)
def test_every_layer_is_on_its_grid_and_nothing_else_changes(family: Family):
    model, dense = family.build(), family.build()
    report = quantize(model, PLAIN)
    assert changed(model, dense) == holding(report)
    last = f"{family.stack}.{model.config.num_hidden_layers - 1}."
    assert {r.name.removeprefix(last) for r in report.layers if r.name.startswith(last)} == family.layers
    for record in report.layers:
        assert (record.tokens, record.few_tokens) == (None, False)
        for group in weight(model, record.name).split(record.group_size or record.shape[1], 1):
            assert all(len(row.unique()) <= 2**3 for row in group)
        difference = weight(model, record.name) - weight(dense, record.name)
        relative = difference.square().sum() / weight(dense, record.name).square().sum()
        assert record.weight_error == pytest.approx(relative.item(), rel=1e-3) and relative < 0.1


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_folds_leave_the_model_as_it_is(name: str):
    """With 8 bits only a wrong fold could change the predictions: routers read the same norms as experts."""
    model, dense = EXPERT_FAMILIES[name].build(), EXPERT_FAMILIES[name].build()
    report = quantize(model, QuantizeConfig(bits=8, group_size=16))
    assert any("balance" in record.transform for record in report.layers if ".experts." in record.name)
    with torch.no_grad():
        new, old = (m(input_ids=windows(2), use_cache=False).logits for m in (model, dense))
    assert (new - old).norm() < 0.05 * old.norm()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_errors_are_of_the_tokens_routed_to_each_expert(name: str):
    """In the first block with attention left alone, these are the inputs in a plain forward pass."""
    model, dense, tokens = EXPERT_FAMILIES[name].build(), EXPERT_FAMILIES[name].build(), windows(8)
    config = PLAIN.model_copy(update={"ignore": ("re:self_attn", "re:layers.1", "down_proj")})
    blind = EXPERT_FAMILIES[name].build()
    quantize(blind, config)
    report = quantize(model, config, tokens)
    inputs = plain_expert_inputs(dense, tokens, "model.layers.0.mlp.experts")
    assert len(report.layers) == EXPERTS
    for record in report.layers:
        x, exact = inputs[record.name], weight(dense, record.name).double()

        energy = (x @ exact.T).square().sum()
        found, without = (
            ((x @ (weight(m, record.name).double() - exact).T).square().sum() / energy).item() for m in (model, blind)
        )
        assert record.tokens == len(x)
        assert record.output_error == pytest.approx(found, rel=1e-3)
        assert found < 0.9 * without


def test_an_expert_without_tokens_is_rounded_as_without_data():
    def starved() -> PreTrainedModel:
        model = EXPERT_FAMILIES["gpt_oss"].build()
        for block in range(2):
            model.get_parameter(f"model.layers.{block}.mlp.router.bias").data[3] = -1e4
        return model

    model, blind = starved(), starved()
    report = quantize(model, PLAIN, windows(4))
    quantize(blind, PLAIN)
    for record in report.layers:
        silent = ".experts.3." in record.name
        assert (record.tokens == 0) == silent == (record.output_error is None)
        assert torch.equal(weight(model, record.name), weight(blind, record.name)) == silent
        assert record.few_tokens or ".experts." not in record.name


def test_zeros_of_pruned_experts_stay():
    model = EXPERT_FAMILIES["qwen3_moe"].build()
    prune(model, windows(4), PruneConfig(selector="wanda"))
    zeros = {name: tensor == 0 for name, tensor in model.state_dict().items() if ".experts." in name}
    report = quantize(model, QuantizeConfig(bits=4, group_size=16), windows(4))
    assert all(record.pruned for record in report.layers)
    assert all((model.state_dict()[name][mask] == 0).all() and mask.any() for name, mask in zeros.items())


def saved(folder: Path, family: Family) -> str:
    family.build().bfloat16().save_pretrained(folder / "model")
    make_word_tokenizer().save_pretrained(folder / "model")
    return str(folder / "model")


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_plain_transformers_loads_the_dense_format(name: str, tmp_path: Path):
    source, device = saved(tmp_path, EXPERT_FAMILIES[name]), torch.device("cpu")
    quantize_checkpoint(source, tmp_path / "out", PLAIN, format="dense", device=device)
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    quantize(expected, PLAIN)
    assert not changed(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto"), expected)


SYMMETRIC = QuantizeConfig(bits=3, group_size=8, symmetric=True)
PACKED = ["mixtral", "qwen3_moe", "qwen2_moe", "deepseek_v3", "phimoe"]


def stored(directory: Path) -> set[str]:
    """Names of the tensors in the files of a model."""
    return {name for file in directory.glob("*.safetensors") for name in safe_open(file, framework="pt").keys()}  # noqa: SIM118


def assert_loads_as(expected: PreTrainedModel, directory: Path) -> None:
    """By plain transformers, which must find every weight and know all that it finds."""
    model, info = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        new, old = (m(input_ids=windows(2), use_cache=False).logits for m in (model, expected))
    assert torch.equal(new, old)
    assert not changed(model, expected)


@pytest.mark.parametrize("name", PACKED)
def test_packed_experts_are_what_is_in_memory(name: str, tmp_path: Path):
    """In files each layer of an expert is one of its own, under the name that it had before, and so is all else."""
    source = saved(tmp_path, EXPERT_FAMILIES[name])
    report = quantize_checkpoint(source, tmp_path / "out", SYMMETRIC, device=torch.device("cpu"))
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    quantize(expected, SYMMETRIC)
    assert_loads_as(expected, tmp_path / "out")
    assert any(".experts." in record.name for record in report.layers)
    names = {re.sub("_(packed|scale|shape)$", "", name) for name in stored(tmp_path / "out")}
    assert names == stored(tmp_path / "model")
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    router = "model.layers.1.block_sparse_moe.gate" if name == "mixtral" else "model.layers.1.mlp.gate"
    assert name == "phimoe" or router in quantization["ignore"]


@pytest.mark.parametrize("ignored", [("re:experts",), ("re:self_attn",)])
def test_experts_or_all_others_stay_as_they_are(ignored: tuple[str, ...], tmp_path: Path):
    config = SYMMETRIC.model_copy(update={"ignore": ignored})
    source = saved(tmp_path, EXPERT_FAMILIES["mixtral"])
    quantize_checkpoint(source, tmp_path / "out", config, device=torch.device("cpu"))
    expected = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    quantize(expected, config)
    assert_loads_as(expected, tmp_path / "out")


def test_experts_have_their_own_grid_among_several(tmp_path: Path):
    """The first layer is the output projection of attention: 18 inputs, in groups of 9, and experts in those of 8."""
    family = EXPERT_FAMILIES["qwen3_moe"]
    model = family.build(num_attention_heads=3, num_key_value_heads=1, head_dim=6).bfloat16()
    model.save_pretrained(tmp_path / "model")
    make_word_tokenizer().save_pretrained(tmp_path / "model")
    config = SYMMETRIC.model_copy(update={"ignore": ("re:[qkv]_proj",)})
    quantize_checkpoint(str(tmp_path / "model"), tmp_path / "out", config, device=torch.device("cpu"))
    groups = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["config_groups"]
    assert {group["weights"]["group_size"] for group in groups.values()} == {8, 9}
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    quantize(expected, config)
    assert_loads_as(expected, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("gpt_oss", {}, r"experts\.0\.gate_up_proj is one of several experts in one tensor, but .* --format dense"),
        (
            "mixtral",
            {"symmetric": False},
            "packed experts cannot have zero points: give --symmetric",
        ),
        ("mixtral", {"transform": "online"}, "packed experts take no online transformations"),
        ("mixtral", {"ignore": ("re:experts.2",)}, r"experts\.2\.gate_up_proj stays as it is, .* ignore all or none"),
        (
            "qwen3_moe",
            {"group_size": 16},
            r"one group size, but that of .* is 16 and that of .* the whole row: give a smaller --group-size",
        ),
    ],
)
def test_experts_that_no_packed_file_can_hold(name: str, changes: dict[str, Any], message: str, tmp_path: Path):
    config = SYMMETRIC.model_copy(update=changes)
    with pytest.raises(InputError, match=message):
        quantize_checkpoint(
            saved(tmp_path, EXPERT_FAMILIES[name]), tmp_path / "out", config, device=torch.device("cpu")
        )
    assert not (tmp_path / "out").exists()
