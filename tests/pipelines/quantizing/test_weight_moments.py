"""Second moments told by weights follow the model's own wiring: scales, residual factors, parallel blocks."""

import pytest
import torch
from families import EVERYTHING, VOCABULARY
from torch import Tensor
from transformers import PreTrainedModel

from trimfit.models.flow import find_flow
from trimfit.models.structure import Block, find_blocks
from trimfit.pipelines.quantizing.weight_moments import WeightMoments

PARALLEL = ["phi", "cohere", "cohere2", "gpt_neox", "stablelm-parallel"]
SEQUENTIAL = ["llama", "gemma2", "granite", "gpt_neox-sequential", "stablelm", "olmo2", "opt"]


def entering(model: PreTrainedModel, block: Block) -> Tensor:
    """(tokens, n) hidden states that enter a block, for each token of the vocabulary once."""
    caught: list[Tensor] = []
    handle = block.module.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    with torch.no_grad(), handle:
        model(torch.arange(VOCABULARY)[:, None])
    return caught[0].flatten(0, 1)


def grams(model: PreTrainedModel) -> list[dict[str, Tensor]]:
    """Of each block, by the last two parts of the layers' names."""
    moments = WeightMoments(model)
    found: list[dict[str, Tensor]] = []
    for block in find_blocks(model):
        flow = find_flow(model, block.name)
        assert flow is not None
        found.append({name.removeprefix(block.name): gram for name, gram in moments.grams(flow, {}).items()})
    return found


def scale_what_is_written(model: PreTrainedModel, factor: float, *, attention_only: bool = False) -> None:
    with torch.no_grad():
        for block in find_blocks(model):
            flow = find_flow(model, block.name)
            assert flow is not None
            for layer in (flow.attention.output_layer, *([] if attention_only else [flow.hidden.down])):
                layer.write(layer.weight * factor)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3_text", "granite", "gpt_neox"])
def test_the_first_block_is_entered_with_the_size_that_the_model_gives_its_embedding(name: str):
    model = EVERYTHING[name].build()
    told = WeightMoments(model).stream.moment
    seen = entering(model, find_blocks(model)[0])
    torch.testing.assert_close(told.trace(), seen.square().sum(1).mean(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", [*PARALLEL, *SEQUENTIAL])
def test_only_mlps_that_run_after_attention_read_what_it_wrote(name: str):
    model = EVERYTHING[name].build()
    before = grams(model)[0]
    scale_what_is_written(model, 30.0, attention_only=True)
    after = grams(model)[0]
    flow = find_flow(model, find_blocks(model)[0].name)
    assert flow is not None
    up = flow.hidden.up.name.removeprefix(find_blocks(model)[0].name)
    assert torch.equal(before[up], after[up]) == (name in PARALLEL)


def test_a_factor_on_what_is_written_is_as_good_as_one_in_the_weights():
    factor = 0.25
    scaled = EVERYTHING["granite"].build(residual_multiplier=factor)
    plain = EVERYTHING["granite"].build(residual_multiplier=1.0)
    unlike = grams(plain)
    scale_what_is_written(plain, factor)
    for one, other, different in zip(grams(scaled), grams(plain), unlike, strict=True):
        for name, gram in one.items():
            torch.testing.assert_close(gram, other[name])
        assert not torch.allclose(one[".mlp.up_proj"], different[".mlp.up_proj"], rtol=0.05)
