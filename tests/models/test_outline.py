"""What a model will be asked to compute, from its config, beside what it does when it runs."""

import pytest
import torch
from families import EVERYTHING, EXPERT_FAMILIES, EXPERTS, FAMILIES, LENGTH, Family, for_each, windows
from transformers import AutoConfig

from trimfit.models import Walker, find_blocks
from trimfit.models.outline import outline


@for_each(EVERYTHING | EXPERT_FAMILIES)
def test_groups_and_weights_are_those_of_the_model(family: Family):
    model = family.build()
    blocks = find_blocks(model)
    walker = Walker(model, blocks, {"all": windows(1)})
    next(iter(walker))
    expected = [
        [(tuple(layer.weight.shape[0] for layer in g.layers), g.layers[0].weight.shape[1]) for g in walker.groups(b)]
        for b in blocks
    ]
    found = outline(model.config, torch.float32, LENGTH)
    if model.config.model_type not in ("opt", "biogpt"):  # which look at values: each layer counts alone there
        groups = [[(group.rows, group.inputs) for group in block.groups] for block in found.blocks]
        if family.name in EXPERT_FAMILIES:  # told after all others
            groups, expected = ([sorted(block) for block in model] for model in (groups, expected))
        assert groups == expected
    assert found.weights == sum(layer.weight.numel() for block in blocks for layer in block.layers)
    assert found.bytes == sum(p.nbytes for p in model.parameters())
    states = model(windows(1), output_hidden_states=True).hidden_states
    assert found.hidden == states[1].shape[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@for_each(EXPERT_FAMILIES)
def test_experts_share_the_tokens(family: Family, dtype: torch.dtype):
    found = outline(family.build().config, dtype, LENGTH)
    experts = [group for group in found.blocks[-1].groups if group.share < 1]
    assert len(experts) == 2 * EXPERTS
    assert sum(group.share for group in experts) == pytest.approx(2 * 2)  # two layers, two experts for each token
    first, second = experts[:EXPERTS], experts[EXPERTS:]
    for run in (first, second):
        assert [group.together for group in run] == [EXPERTS] + [1] * (EXPERTS - 1)
        assert run[0].flops_before > 0 and not any(group.flops_before for group in run[1:])
    work = 2 * 2 * LENGTH * first[0].rows[0] * first[0].inputs
    assert work <= second[0].flops_before - first[0].flops_before < 1.1 * work
    assert not any(group.adds for group in experts)


def test_flops_by_hand():
    """Llama of width 32, 4 heads and 2 of keys and values of 8 each, and 48 in the middle."""
    config = AutoConfig.for_model("llama", vocab_size=64, **FAMILIES["llama"].options)
    found = outline(config, torch.bfloat16, LENGTH)
    assert (found.dtype, found.vocabulary, len(found.blocks)) == (torch.bfloat16, 64, 2)
    qkv, attention, o, gate_up, down = 32 * 64, 2 * LENGTH * 32, 32 * 32, 2 * 32 * 48, 48 * 32
    for block in found.blocks:
        before = [group.flops_before for group in block.groups]
        parts = [0, qkv + attention, o, gate_up]
        assert before == [2 * LENGTH * sum(parts[: i + 1]) for i in range(4)]
        assert block.flops == 2 * LENGTH * (sum(parts) + down)
        assert block.bytes == 2 * (qkv + o + gate_up + down + 2 * 32)
        assert [group.adds for group in block.groups] == [False, True, False, True]


def test_ignored_layers_are_run_but_not_pruned():
    config = AutoConfig.for_model("llama", vocab_size=64, **FAMILIES["llama"].options)
    whole, part = outline(config, torch.float32, LENGTH), outline(config, torch.float32, LENGTH, ["*.down_proj"])
    assert [len(block.groups) for block in part.blocks] == [3, 3]
    assert [block.flops for block in part.blocks] == [block.flops for block in whole.blocks]
    assert part.bytes == whole.bytes
