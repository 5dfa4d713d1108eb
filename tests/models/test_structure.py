"""Blocks and layers are found by structure, whatever the family, and what cannot be compressed is refused."""

from typing import Any

import pytest
import torch
from families import EVERYTHING, FAMILIES, Family, for_each, matrix, vision_language_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    LlamaModel,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from trimfit.errors import InputError
from trimfit.models import find_blocks, select_layers


@for_each(EVERYTHING)
def test_blocks_and_layers(family: Family):
    model = family.build()
    blocks = find_blocks(model)
    assert [block.index for block in blocks] == list(range(model.config.get_text_config().num_hidden_layers))
    for block in blocks:
        assert block.name == f"{family.stack}.{block.index}"
        assert block.module is model.get_submodule(block.name)
        assert {layer.name.removeprefix(f"{block.name}.") for layer in block.layers} == family.layers
        assert len(block.layers) == len(family.layers)
        for layer in block.layers:
            assert layer.module is model.get_submodule(layer.name)


def test_names_of_one_block():
    names = [layer.name for layer in find_blocks(FAMILIES["llama"].build())[1].layers]
    assert names == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
        "model.layers.1.self_attn.v_proj",
        "model.layers.1.self_attn.o_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.1.mlp.down_proj",
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2"])
@torch.no_grad()
def test_weights_are_rows_by_inputs_and_written_as_such(name: str):
    model = FAMILIES[name].build()
    for layer in find_blocks(model)[0].layers:
        bias = getattr(layer.module, "bias", None)
        x = torch.randn(5, layer.weight.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(x @ layer.weight.T + (0 if bias is None else bias), layer.module(x))
        new = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(1))
        layer.write(new)
        assert torch.equal(matrix(layer.module), new)
        torch.testing.assert_close(x @ new.T + (0 if bias is None else bias), layer.module(x))


def test_writing_rounds_to_the_dtype_of_the_model():
    layer = find_blocks(FAMILIES["llama"].build().bfloat16())[0].layers[0]
    new = torch.randn(layer.weight.shape)
    layer.write(new)
    assert layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, new.bfloat16())


def test_the_text_part_of_a_vision_language_model_is_found():
    """Deeper inside wrappers, beside a vision tower whose blocks are as many and have linear layers too."""
    blocks = find_blocks(vision_language_model())
    assert [block.name for block in blocks] == [f"model.language_model.layers.{i}" for i in range(4)]


_SMALL: dict[str, Any] = FAMILIES["llama"].options


def test_experts_in_a_form_that_is_not_known_are_refused():
    """DBRX has the matrices of all experts in one, two-dimensional."""
    sizes: dict[str, Any] = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 64}
    config = AutoConfig.for_model(
        "dbrx",
        **sizes,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    )
    with pytest.raises(InputError, match=r"blocks\.0\.") as error:
        find_blocks(AutoModelForCausalLM.from_config(config))
    assert "holds a mixture of experts, which this version cannot compress; nothing was changed" in str(error.value)


def test_experts_in_a_list_are_refused():
    model = FAMILIES["llama"].build()
    model.get_submodule("model.layers.1.mlp").experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts holds a mixture of experts"):
        find_blocks(model)


def test_a_block_with_most_of_its_weights_elsewhere_is_refused():
    model = FAMILIES["llama"].build()
    model.get_submodule("model.layers.0.mlp").kernel = nn.Parameter(torch.zeros(100, 32))
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp holds weights that are not in linear layers"):
        find_blocks(model)


_NOT_CAUSAL = {
    "encoder": lambda: BertForMaskedLM(BertConfig(**_SMALL)),
    "vision": lambda: ViTForImageClassification(ViTConfig(**_SMALL, image_size=32, patch_size=16)),
    "encoder-decoder": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ),
    "no head": lambda: LlamaModel(FAMILIES["llama"].build().config),
}


@pytest.mark.parametrize("kind", _NOT_CAUSAL)
def test_models_that_are_no_causal_lm_are_refused(kind: str):
    with pytest.raises(InputError, match="is not a decoder-only language model"):
        find_blocks(_NOT_CAUSAL[kind]())


def test_a_model_without_a_list_of_blocks_is_refused():
    model = FAMILIES["llama"].build()
    model.config.num_hidden_layers = 7
    with pytest.raises(InputError, match="no decoder blocks were found in LlamaForCausalLM: expected a list of 7"):
        find_blocks(model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantized_layers_are_refused(dtype: torch.dtype):
    model = FAMILIES["llama"].build()
    linear = model.get_submodule("model.layers.1.mlp.up_proj")
    linear.weight = nn.Parameter(linear.get_parameter("weight").detach().to(dtype), requires_grad=False)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj is already quantized \(torch\..*int8|float8"):
        find_blocks(model)


def test_a_quantized_model_is_refused_by_its_config():
    model = FAMILIES["llama"].build()
    model.config.quantization_config = {"quant_method": "gptq"}
    with pytest.raises(InputError, match="LlamaForCausalLM is already quantized"):
        find_blocks(model)


def test_layers_that_share_weights_are_refused():
    model = FAMILIES["llama"].build()
    model.get_submodule("model.layers.1.mlp").up_proj = model.get_submodule("model.layers.0.mlp.up_proj")
    message = r"model\.layers\.1\.mlp\.up_proj shares its weights with model\.layers\.0\.mlp\.up_proj"
    with pytest.raises(InputError, match=message):
        find_blocks(model)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return FAMILIES["llama"].build()


def ignored(model: PreTrainedModel, *patterns: str) -> set[str]:
    """Names of the layers that `select_layers` leaves out."""
    blocks = find_blocks(model)
    chosen = select_layers(model, blocks, patterns)
    assert [block.name for block in chosen] == [block.name for block in blocks]
    every = {layer.name for block in blocks for layer in block.layers}
    left = [layer.name for block in chosen for layer in block.layers]
    assert left == [layer.name for block in blocks for layer in block.layers if layer.name in left]  # in order
    return every - set(left)


def test_ignore_nothing(model: PreTrainedModel):
    assert ignored(model) == set()


@pytest.mark.parametrize(
    "pattern", ["*.q_proj", "q_proj", "self_attn.q_proj", "re:q_proj$", r"re:layers\.\d+\.self_attn\.q", "*q_proj"]
)
def test_ignore_all_layers_of_a_kind(model: PreTrainedModel, pattern: str):
    assert ignored(model, pattern) == {f"model.layers.{i}.self_attn.q_proj" for i in range(2)}


@pytest.mark.parametrize("pattern", ["model.layers.0.*", "layers.0.*", r"re:^model\.layers\.0\."])
def test_ignore_a_block(model: PreTrainedModel, pattern: str):
    assert ignored(model, pattern) == {f"model.layers.0.{name}" for name in FAMILIES["llama"].layers}


def test_ignore_one_layer(model: PreTrainedModel):
    name = "model.layers.1.mlp.down_proj"
    assert ignored(model, name) == {name}


def test_ignore_a_choice_of_characters(model: PreTrainedModel):
    assert ignored(model, "[qk]_proj") == {f"model.layers.{i}.self_attn.{p}_proj" for i in (0, 1) for p in "qk"}


def test_ignore_patterns_add_up(model: PreTrainedModel):
    both = ignored(model, "down_proj", "re:o_proj")
    assert both == ignored(model, "down_proj") | ignored(model, "o_proj")
    assert len(both) == 4


def test_ignore_the_head_may_be_named(model: PreTrainedModel):
    assert ignored(model, "lm_head") == set()


@pytest.mark.parametrize("pattern", ["proj", "q_proj.weight", "Q_proj", "re:^q_proj", "norm", "model.layers.2.*"])
def test_ignore_matching_nothing_is_an_error(model: PreTrainedModel, pattern: str):
    with pytest.raises(InputError) as error:
        ignored(model, "o_proj", pattern)
    assert str(error.value) == (
        f"the ignore pattern {pattern!r} matches no linear layer; names look like "
        "'model.layers.0.self_attn.q_proj' and 'lm_head'"
    )


def test_ignore_matching_everything_is_an_error(model: PreTrainedModel):
    with pytest.raises(InputError, match="the ignore patterns leave no layer to compress"):
        ignored(model, "*")


def test_ignore_a_broken_expression_is_an_error(model: PreTrainedModel):
    with pytest.raises(InputError, match=r"the ignore pattern 're:\(' is not a regular expression: .*unterminated"):
        ignored(model, "re:(")
