"""The walker sees what a plain forward pass of the whole model sees, one block at a time."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from families import EVERYTHING, FAMILIES, LENGTH, Family, for_each, plain_grams, plain_inputs, windows
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from trimfit.errors import InputError
from trimfit.models import Block, Group, Walker, find_blocks, select_layers

WINDOWS = {"fit": windows(5), "held_out": windows(3, seed=2)}


@torch.no_grad()
def plain_states(model: PreTrainedModel, tokens: Tensor) -> list[Tensor]:
    """What each block receives in a plain forward pass, as transformers itself reports it."""
    return list(model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[:-1])


def names(block: Block) -> list[str]:
    return [layer.name for layer in block.layers]


def assert_grams_close(gram: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert gram.dtype == torch.float32
    assert (gram.double() - expected).abs().max() <= tolerance * expected.diagonal().max()


def walk(model: PreTrainedModel, batch_size: int = 2, ignore: Sequence[str] = ()) -> Walker:
    return Walker(model, select_layers(model, find_blocks(model), ignore), dict(WINDOWS), batch_size)


def standing_before(walker: Walker, name: str) -> Tensor:
    """The hidden states (windows, length, n) that the walker holds."""
    return torch.cat([kept.get() for kept in walker._hidden[name]])


@for_each(EVERYTHING)
def test_groups(family: Family):
    walker = walk(family.build())
    for block in walker:
        groups = [tuple(layer.name.removeprefix(f"{block.name}.") for layer in g.layers) for g in walker.groups(block)]
        assert tuple(groups) == family.groups
        assert all(group.calls == 1 for group in walker.groups(block))


def check_hidden_states(family: Family, batch_size: int) -> None:
    model = family.build()
    walker = walk(model, batch_size)
    expected = {name: plain_states(model, tokens) for name, tokens in WINDOWS.items()}
    for index, block in enumerate(walker):
        assert block.index == index
        for name in WINDOWS:
            torch.testing.assert_close(standing_before(walker, name), expected[name][index])


@for_each(EVERYTHING)
def test_hidden_states_are_those_of_a_plain_forward_pass(family: Family):
    check_hidden_states(family, batch_size=2)  # of 5 and 3 windows: the last batch is smaller


@for_each(FAMILIES)
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_hidden_states_for_other_sizes_of_batches(family: Family, batch_size: int):
    check_hidden_states(family, batch_size)


@for_each(EVERYTHING)
def test_gram_matrices_are_those_of_a_plain_forward_pass(family: Family):
    model = family.build()
    walker = walk(model)
    for name, tokens in WINDOWS.items():
        for block in walker:
            expected = plain_grams(model, tokens, names(block))
            groups = walker.groups(block)
            together = walker.grams(block, groups, name)
            for group, gram in zip(groups, together, strict=True):
                for layer in group.layers:
                    assert_grams_close(gram, expected[layer.name])
                assert torch.equal(walker.grams(block, [group], name)[0], gram)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_gram_matrices_in_bfloat16_are_summed_in_float32(name: str):
    model = FAMILIES[name].build().bfloat16()
    walker = walk(model, batch_size=5)  # as the plain forward pass, which else rounds otherwise
    for block in walker:
        expected = plain_grams(model, WINDOWS["fit"], names(block))
        for group, gram in zip(groups := walker.groups(block), walker.grams(block, groups, "fit"), strict=True):
            assert_grams_close(gram, expected[group.layers[0].name])


@for_each(FAMILIES)
def test_later_gram_matrices_see_changed_weights(family: Family):
    """Group after group and block after block, as in pruning: each sees all that was changed before it."""
    model = family.build()
    walker = walk(model)
    dense = family.build()
    for block in walker:
        before = plain_grams(dense, WINDOWS["fit"], names(block))
        for i, group in enumerate(walker.groups(block)):
            (gram,) = walker.grams(block, [group], "fit")
            name = group.layers[0].name
            assert_grams_close(gram, plain_grams(model, WINDOWS["fit"], [name])[name])
            beside_attention = family.name == "gpt_neox" and i == 2  # where its MLP stands
            if block.index > 0 or (i > 0 and not beside_attention):
                assert (gram - before[name]).abs().max() > 1e-3 * before[name].abs().max()
            for layer in group.layers:
                layer.write(layer.weight.clamp(min=0))


def test_gram_matrices_taken_before_a_change_are_dense():
    """capture="block": all groups of a block at once, before any of its layers changes."""
    model, dense = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    walker = walk(model)
    block = next(iter(walker))
    expected = plain_grams(dense, WINDOWS["fit"], names(block))
    for group, gram in zip(groups := walker.groups(block), walker.grams(block, groups, "fit"), strict=True):
        for layer in group.layers:
            assert_grams_close(gram, expected[layer.name])
            layer.write(layer.weight * 0.5)


def test_ignored_layers_are_in_no_group():
    walker = walk(FAMILIES["llama"].build(), ignore=["q_proj", "down_proj", "layers.1.*"])
    groups = {block.index: walker.groups(block) for block in walker}
    found = [[layer.name.rpartition(".")[2] for layer in group.layers] for group in groups[0]]
    assert found == [["k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"]]
    assert groups[1] == []


def test_a_forward_pass_for_gram_matrices_ends_at_the_last_group():
    model = FAMILIES["llama"].build()
    walker = walk(model)
    block = next(iter(walker))
    model.get_submodule("model.layers.0.self_attn").register_forward_hook(lambda *_: pytest.fail("went on"))
    walker.grams(block, walker.groups(block)[:2], "fit")


class _Twice(nn.Module):
    """Calls one linear layer on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.tanh(self.linear(x)))


def test_a_layer_called_twice_sums_both_inputs():
    model = FAMILIES["llama"].build()
    model.get_submodule("model.layers.0").mlp = _Twice()
    walker = walk(model)
    block = next(iter(walker))
    name = "model.layers.0.mlp.linear"
    (group,) = (group for group in walker.groups(block) if group.layers[0].name == name)
    assert group == Group((block.layers[-1],), calls=2)
    (gram,) = walker.grams(block, [group], "fit")
    assert_grams_close(gram, plain_grams(model, WINDOWS["fit"], [name])[name])
    assert len(plain_inputs(model, WINDOWS["fit"], [name])[name]) == 2 * 5 * LENGTH


def test_a_layer_that_is_never_called_is_an_error_unless_ignored():
    model = FAMILIES["llama"].build()
    model.get_submodule("model.layers.1.mlp").spare = nn.Linear(32, 32)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.spare receives no input in a forward pass"):
        next(iter(walk(model)))
    assert len(list(walk(model, ignore=["spare"]))) == 2


def hooks(model: nn.Module) -> list[str]:
    """Modules that have any hook."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return [name for name, module in model.named_modules() if any(getattr(module, kind) for kind in kinds)]


class _Broken(Exception):
    pass


@pytest.mark.parametrize("end", ["at the end", "after a block", "by an error outside", "by an error inside"])
def test_everything_is_left_as_it_was(end: str):
    """Training mode of each module, gradients, hooks: however the walk ends."""
    model = FAMILIES["gpt2"].build()
    model.train()
    model.get_submodule("transformer.h.1.mlp").eval()  # a frozen part
    training = {name: module.training for name, module in model.named_modules()}
    walker = walk(model)

    def run() -> None:
        for block in walker:
            assert not model.training
            assert not torch.is_grad_enabled()
            if end == "after a block":
                break
            if end == "by an error outside":
                raise _Broken
            if end == "by an error inside":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(model.get_submodule("transformer.h.0.mlp"), "forward", fail)
                    walker.grams(block, walker.groups(block), "fit")

    def fail(*arguments: Any) -> Tensor:
        raise _Broken

    if "error" in end:
        with pytest.raises(_Broken):
            run()
    else:
        run()
    assert {name: module.training for name, module in model.named_modules()} == training
    assert torch.is_grad_enabled()
    assert hooks(model) == []


def test_only_hidden_states_are_held():
    model = FAMILIES["llama"].build()
    walker = walk(model)
    for block in walker:
        walker.grams(block, walker.groups(block), "fit")
        held = [kept.get() for batches in walker._hidden.values() for kept in batches]
        assert sum(tensor.nbytes for tensor in held) == (5 + 3) * LENGTH * 32 * 4
        # What is replayed is what a batch shares: masks and positions, no hidden states.
        replayed = [t for calls in walker._calls.values() for call in calls for t in _tensors(vars(call))]
        assert all(tensor.shape != (2, LENGTH, 32) for tensor in replayed)
        assert all(tensor.shape[0] == 1 or tensor.shape[-1] != 32 for tensor in replayed)


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple | type({}.values())) else []


_SMALL = FAMILIES["llama"].options
_SIDE_DATA: dict[str, dict[str, Any]] = {
    # Streams of hidden states, and inputs for each layer and token.
    "gemma3n_text": _SMALL
    | {
        "head_dim": 8,
        "vocab_size_per_layer_input": 64,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    # Later blocks use the keys and values of earlier ones.
    "gemma4_text": _SMALL
    | {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "head_dim": 8,
        "global_head_dim": 8,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 2,
    },
}


@pytest.mark.parametrize("name", _SIDE_DATA)
def test_blocks_that_exchange_data_are_refused(name: str):
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **_SIDE_DATA[name] | {"vocab_size": 64, "pad_token_id": 0})
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(InputError, match="exchange data beside the hidden states"):
        next(iter(walk(model)))


def test_blocks_that_talk_through_the_side_are_refused():
    """The second block uses what the first left on a module: right window by window, wrong batch by batch."""
    model = FAMILIES["llama"].build()
    first, second = model.get_submodule("model.layers.0"), model.get_submodule("model.layers.1")
    plain = {block: block.forward for block in (first, second)}
    left: list[Tensor] = []

    def leave(hidden_states: Tensor, **keywords: Any) -> Tensor:
        left[:] = [hidden_states]
        return plain[first](hidden_states, **keywords)

    def take(hidden_states: Tensor, **keywords: Any) -> Tensor:
        return plain[second](hidden_states + left[0], **keywords)

    first.forward, second.forward = leave, take
    with pytest.raises(InputError, match="exchange data beside the hidden states"):
        next(iter(walk(model)))


def test_blocks_in_another_order_are_refused():
    model = FAMILIES["llama"].build()
    blocks = find_blocks(model)
    with pytest.raises(InputError, match="are not called one after the other"):
        next(iter(Walker(model, blocks[::-1], dict(WINDOWS), 2)))


def test_a_block_called_twice_is_refused():
    model = FAMILIES["llama"].build()
    blocks = find_blocks(model)
    stack = model.get_submodule("model.layers")
    model.model.layers = nn.ModuleList([stack[0], stack[0], stack[1]])
    model.model.config.num_hidden_layers = 3
    with pytest.raises(InputError, match="are not called one after the other"):
        next(iter(Walker(model, blocks, dict(WINDOWS), 2)))


@pytest.mark.parametrize("form", ["tuple", "list", "keyword"])
def test_other_ways_to_call_a_block(form: str):
    """Blocks that give tuples or lists, and blocks that take the hidden states by keyword only."""
    model = FAMILIES["llama"].build()
    expected = plain_states(model, WINDOWS["fit"])
    for block in find_blocks(model):
        _rewrap(block.module, form)
    if form == "keyword":
        for block in find_blocks(model):
            block.module.register_forward_pre_hook(_by_keyword, with_kwargs=True)
    else:
        _unwrap_between(model)
    walker = walk(model)
    for index, _ in enumerate(walker):
        torch.testing.assert_close(standing_before(walker, "fit"), expected[index])


def _rewrap(module: nn.Module, form: str) -> None:
    plain = module.forward

    def forward(*arguments: Any, hidden_states: Any = None, **keywords: Any) -> Any:
        states = arguments[0] if hidden_states is None else hidden_states
        if form == "keyword":
            assert not arguments
            return plain(states, **keywords)
        if isinstance(states, tuple | list):  # as the plain model's loop passes it on
            states = states[0]
        return (tuple if form == "tuple" else list)([plain(states, **keywords), "something else"])

    module.forward = forward


def _by_keyword(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    return ((), {**keywords, "hidden_states": arguments[0]}) if arguments else None


def _unwrap_between(model: PreTrainedModel) -> None:
    """The model's own loop takes the first of what each block gives, as those of such families do."""
    norm = model.get_submodule("model.norm")
    norm.register_forward_pre_hook(lambda module, arguments: (arguments[0][0],))


def test_hidden_states_that_overflow_are_an_error():
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.down_proj").get_parameter("weight").fill_(1e38)
    with pytest.raises(InputError, match=r"hidden states of LlamaForCausalLM have NaN or infinite entries.*float32"):
        next(iter(walk(model)))


def test_one_window_is_enough():
    model = FAMILIES["gemma3_text"].build()
    walker = Walker(model, find_blocks(model), {"fit": windows(1)}, 8)
    expected = plain_states(model, windows(1))
    for index, _ in enumerate(walker):
        torch.testing.assert_close(standing_before(walker, "fit"), expected[index])


def test_walking_again_starts_again():
    model = FAMILIES["llama"].build()
    walker = walk(model)
    first = [standing_before(walker, "fit") for _ in walker]
    assert [torch.equal(standing_before(walker, "fit"), first[i]) for i, _ in enumerate(walker)] == [True, True]
