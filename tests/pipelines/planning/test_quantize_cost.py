"""The arithmetic of a plan to quantize, by hand and beside real runs, and what is refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from trimfit import QuantizeConfig, quantize
from trimfit.models.outline import BlockOutline, GroupOutline, HeadsOutline, Outline, outline
from trimfit.pipelines.planning.plan import Capacity, disk_bytes, find_problem, memory_peaks
from trimfit.pipelines.planning.prune_cost import seconds
from trimfit.pipelines.planning.quantize_cost import QuantizeJob

GIB = 2**30
# Two blocks of two groups: 10 inputs for layers of 4 and 6 rows; 20 inputs for one that adds to a stream of width 10.
BLOCK = BlockOutline(
    (GroupOutline((4, 6), 10, 0, False), GroupOutline((10,), 20, 1000, True)),
    flops=3000,
    bytes=600,
    largest=20,
    heads=HeadsOutline(2, 1, 2),
    units=20,
)
MODEL = Outline((BLOCK, BLOCK), torch.bfloat16, bytes=2000, hidden=10, vocabulary=40, length=8)
WEIGHTS = 2 * (10 * 10 + 10 * 20)


def job(windows: int = 0, **options: Any) -> QuantizeJob:
    beside = {name: options.pop(name) for name in ("format", "offload", "may_offload") if name in options}
    return QuantizeJob(QuantizeConfig.model_validate(options), windows=windows, **beside)


def test_forward_passes_and_gram_matrices_by_hand():
    """To the second group, 1000; through the block, 3000, but not through the last; 2n² for each of 64 tokens."""
    found = job(windows=8).costs(MODEL)
    assert found["forward"]["model"] == 8 * (2 * 1000 + 3000)
    assert found["gram"]["float32"] == 2 * 2 * 64 * (10**2 + 20**2)
    assert not job().costs(MODEL)["forward"]


@pytest.mark.parametrize(
    ("windows", "options"), [(0, {}), (0, {"transform": "online", "learned_steps": 4}), (4, {"transform": "none"})]
)
def test_products_are_those_of_a_real_run(windows: int, options: dict[str, Any]):
    """Torch counts what products of matrices take; factorisations and solves it does not know."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).bfloat16()
    asked = QuantizeConfig.model_validate({"group_size": 32, **options})
    tokens = torch.randint(config.vocab_size, (windows, 32)) if windows else None
    planned = QuantizeJob(asked, windows=windows).costs(outline(config, torch.bfloat16, 32))
    counter = FlopCounterMode(display=False)
    with counter:
        quantize(model, asked, tokens)
    expected = sum(planned[stage][kind] for stage in planned for kind in ("model", "float32"))
    assert 0.7 < expected / counter.get_total_flops() < 1.4


def test_more_is_done_for_more():
    """Any rates: nearest costs less than feedback, a pair less than both folds, learning more than closed forms."""

    def flops(**options: Any) -> float:
        work = job(**options).costs(MODEL)
        return sum(sum(parts.values()) for parts in work.values())

    assert flops(transform="none", rounding="nearest") < flops(transform="none") < flops(transform="pairs") < flops()
    assert flops(transform="online", learned_steps=0) < flops(transform="online")
    assert flops(transform="pairs") < flops(transform="paper")


def test_a_pair_that_is_learned_is_within_a_factor_of_two_of_a_real_one():
    """Of 6 blocks of width 256 with 4 KV heads of 32 and twice the query heads: some 60 s on one core of 2026."""
    block = replace(BLOCK, heads=HeadsOutline(4, 2, 32))
    work = job(transform="paper").costs(replace(MODEL, blocks=(block,) * 6, hidden=256))
    rates = {"float32": 96e9, "memory": 16e9, "calls": 340e3}  # as measured there
    assert 30 < seconds({"folds": work["folds"]}, rates)["folds"] < 120


def test_disk_by_hand(monkeypatch: pytest.MonkeyPatch):
    """Parts hold the levels, a packed result's as it does, else in a byte each, and a norm of 20 bytes in each block.

    A packed result of one file is there twice while it is written. There are 40 rows with scales of two bytes, and
    without data a second moment for each of two blocks.
    """
    model = replace(MODEL, blocks=(replace(BLOCK, bytes=620),) * 2)
    levels, codes, plain = WEIGHTS * 3 // 8 + 2 * 40, WEIGHTS + 3 * 40, 2 * 20
    packed, parts = 2000 - 2 * WEIGHTS + levels, levels + 2 * plain
    assert disk_bytes(model, job(bits=3), None) == 2 * packed + parts + 2 * 4 * 10**2
    assert disk_bytes(model, job(bits=3, windows=8), None) == 2 * packed + parts
    assert disk_bytes(model, job(bits=3, windows=8, group_size=5), None) == 2 * packed + parts + 3 * 2 * 80
    assert disk_bytes(model, job(format="dense", windows=8), None) == 2000 + codes + plain
    states = 8 * 8 * 10 * 2
    assert disk_bytes(model, job(format="dense", windows=8), 1000) == 2000 + codes + plain + states - 1000
    monkeypatch.setattr("trimfit.pipelines.quantizing.disk.SHARD_BYTES", levels + plain - 1)
    most, outside = levels + plain - 1, 2000 - 2 * 620
    written = outside + min(outside, most)  # the parts are files of the result
    assert disk_bytes(model, job(bits=3, windows=8), None) == parts + written


def test_memory_by_hand():
    assert job(format="dense").memory(MODEL).weights == 2000
    assert job(offload=True).memory(MODEL).weights == 600  # nothing runs, so nothing else is loaded
    held = job(windows=8, offload=True).memory(MODEL)
    assert (held.weights, held.states) == (600 + 2000 - 2 * 600, 8 * 8 * 10 * 2)


@pytest.mark.parametrize("windows", [0, 8])
def test_offloaded_blocks_do_not_add_up(windows: int):
    many = replace(MODEL, blocks=(BLOCK,) * 50, bytes=800 + 50 * 600)
    few = replace(MODEL, blocks=(BLOCK,), bytes=800 + 600)
    for offload, grows in ((False, True), (True, False)):
        asked = job(windows=windows, offload=offload, format="dense")
        peaks = [max(p.host for p in memory_peaks(m, asked, 0, Capacity(1, None, 1, 0))) for m in (few, many)]
        assert (peaks[1] > peaks[0]) is grows


# A model of 100 blocks of 1 GiB, whose layers are of 8192 inputs.
LARGE = Outline(
    (BlockOutline((GroupOutline((8192,) * 8, 8192, 0, False),), 10**12, GIB, 8192),) * 100,
    torch.bfloat16,
    bytes=101 * GIB,
    hidden=8192,
    vocabulary=32000,
    length=2048,
)


@pytest.mark.parametrize(
    ("asked", "host", "expected"),
    [
        (job(format="dense"), 400, None),
        (job(format="dense"), 40, "memory but there are 40.0 GiB: give --offload"),
        (job(offload=True), 2, "no option would change that"),
        (job(windows=128), 40, "memory but there are 40.0 GiB: give --offload"),
        (job(windows=128, offload=True, batch_size=32), 18, "give --batch-size 1"),
        (job(windows=128, may_offload=False), 40, "no option would change that"),
    ],
)
def test_what_cannot_fit_is_told_with_what_would(asked: QuantizeJob, host: int, expected: str | None):
    problem = find_problem(LARGE, asked, None, Capacity(host * GIB, None, 400 * GIB, GIB // 2))
    assert (problem is None) if expected is None else (problem is not None and expected in problem)
