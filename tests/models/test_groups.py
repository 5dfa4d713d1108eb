"""Which layers add to the residual stream, found by running a block; how far that stream and inputs have drifted."""

from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, EVERYTHING, FAMILIES, Family, for_each, plain_inputs, windows
from torch import Tensor, nn
from transformers import PreTrainedModel

from trimfit.calibration import InputMoments
from trimfit.models import Block, Walker, find_blocks

WINDOWS = {"fit": windows(5), "held_out": windows(3, seed=2)}

# Their outputs pass a norm, or are multiplied, before they are added; OPT 350m norms the sum.
ADD_NOTHING_AS_IT_IS = {"gemma2", "gemma3_text", "olmo2", "olmo3", "granite", "glm4", "gemma2-eager", "gemma3-eager"}


def adding(family: Family, dtype: torch.dtype = torch.float32) -> list[tuple[str, str]]:
    model = family.build().to(dtype)
    walker = Walker(model, find_blocks(model), dict(WINDOWS))
    block = next(iter(walker))
    return [
        (group.layers[0].name.removeprefix(f"{block.name}."), group.adds_to)
        for group in walker.groups(block)
        if group.adds_to is not None
    ]


@for_each(EVERYTHING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_last_layers_of_attention_and_mlp_add_to_the_residual_stream(family: Family, dtype: torch.dtype):
    expected = []
    name = next(name for name, other in EVERYTHING.items() if other is family)
    if name not in ADD_NOTHING_AS_IT_IS | {"opt-350m"}:
        narrow = [group[0] for group in family.groups if len(group) == 1 and _ends(group[0])]
        expected = [(narrow[0], "input"), (narrow[-1], "output")]
    assert adding(family, dtype) == expected


def _ends(name: str) -> bool:
    last = name.rpartition(".")[2]
    return last in {"o_proj", "out_proj", "c_proj", "dense", "down_proj", "fc2", "fc_out", "dense_4h_to_h"}


class _ScaledAttention(nn.Module):
    """Multiplies what the attention gives: not what its last layer gives is added, then."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        output, *rest = self.attention(*arguments, **keywords)
        return 0.8 * output, *rest


def test_a_layer_whose_output_is_scaled_does_not_count():
    model = FAMILIES["llama"].build()
    first = model.get_submodule("model.layers.0")
    first.self_attn = _ScaledAttention(first.self_attn)
    walker = Walker(model, find_blocks(model), dict(WINDOWS))
    found = {group.layers[0].name: group.adds_to for group in walker.groups(next(iter(walker)))}
    assert found["model.layers.0.self_attn.attention.o_proj"] is None
    assert found["model.layers.0.mlp.down_proj"] == "output"


def damage(block: Block) -> None:
    for layer in block.layers:
        layer.write(layer.weight.clamp(min=0))


@torch.no_grad()
def residual(model: PreTrainedModel, block: str, name: str, kind: str, tokens: Tensor) -> Tensor:
    """The stream once a layer has added to it, (tokens, d) float64: from the block's own input and output."""
    caught: dict[str, Tensor] = {}

    def first(value: Any) -> Tensor:
        return value[0] if isinstance(value, tuple) else value

    def see(module: nn.Module, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        caught["input"] = arguments[0] if arguments else keywords["hidden_states"]
        caught["output"] = first(output)

    handles = [
        model.get_submodule(block).register_forward_hook(see, with_kwargs=True),
        model.get_submodule(f"{block}.{name}").register_forward_hook(
            lambda module, arguments, output: caught.update(own=output.clone())
        ),
    ]
    model(input_ids=tokens, use_cache=False)
    for handle in handles:
        handle.remove()
    states = caught["input"] + caught["own"].view_as(caught["input"]) if kind == "input" else caught["output"]
    return states.flatten(0, 1).double()


@for_each(FAMILIES)
def test_drift_is_that_between_the_model_and_the_dense_model(family: Family):
    """With the first block damaged, and of the second all that comes before the layer in question as it was."""
    model, dense = family.build(), family.build()
    walker = Walker(model, find_blocks(model), dict(WINDOWS), batch_size=2, dense=True)
    for block in walker:
        groups = walker.groups(block)
        for name, tokens in WINDOWS.items():
            moments = walker.moments(block, groups, name)
            layers = [group.layers[0].name for group in groups]
            inputs, dense_inputs = plain_inputs(model, tokens, layers), plain_inputs(dense, tokens, layers)
            for layer, group, found in zip(layers, groups, moments, strict=True):
                x, count = inputs[layer], len(inputs[layer])
                assert found.drift is not None
                assert (found.drift.inputs is None) == (found.drift.stream is not None) == (group.adds_to is not None)
                if found.drift.inputs is not None:
                    close(found.drift.inputs, (x - dense_inputs[layer]).T @ x / count)
                if found.drift.stream is not None and group.adds_to is not None:
                    short = layer.removeprefix(f"{block.name}.")
                    here, there = (residual(m, block.name, short, group.adds_to, tokens) for m in (model, dense))
                    close(found.drift.stream, (here - there).T @ x / count)
        if block.index == 0:
            assert not any(drift(m).any() for m in moments)
            damage(block)


def drift(moments: InputMoments) -> Tensor:
    """Whichever of the two is there."""
    assert moments.drift is not None
    found = moments.drift.inputs if moments.drift.stream is None else moments.drift.stream
    assert found is not None
    return found


def close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).abs().max() <= 1e-5 * max(1.0, expected.abs().max().item())


def test_the_dense_stream_sees_no_change_in_a_block():
    """Layers of a block change one after the other; the copy that the dense stream goes through does not."""
    model, dense = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    walker = Walker(model, find_blocks(model), dict(WINDOWS), dense=True)
    for block in walker:
        damage(block)
        for group in walker.groups(block):
            (moments,) = walker.moments(block, [group], "fit")
            name = group.layers[0].name
            x, y = (plain_inputs(m, WINDOWS["fit"], [name])[name] for m in (model, dense))
            if group.adds_to is None:
                close(drift(moments), (x - y).T @ x / len(x))
            else:
                short = name.removeprefix(f"{block.name}.")
                here, there = (residual(m, block.name, short, group.adds_to, WINDOWS["fit"]) for m in (model, dense))
                close(drift(moments), (here - there).T @ x / len(x))
        with pytest.raises(ValueError, match="has gone through"):
            walker.moments(block, walker.groups(block)[:1], "fit")
        walker.moments(block, walker.groups(block), "held_out")  # a set of its own


def test_no_drift_without_a_dense_stream():
    model = ALL_FAMILIES["gpt2"].build()
    walker = Walker(model, find_blocks(model), dict(WINDOWS))
    block = next(iter(walker))
    assert [moments.drift for moments in walker.moments(block, walker.groups(block), "fit")] == [None] * 4
