"""Mixtures of experts: each expert is pruned on the tokens routed to it, and the record says when they are few."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import EXPERT_FAMILIES, EXPERTS, Family, for_each, make_word_tokenizer, plain_expert_inputs, windows
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimfit import CalibrationConfig, PruneConfig, PruneReport, prune
from trimfit.cli import show
from trimfit.models import Walker, find_blocks, groups
from trimfit.pipelines.observer import Silent
from trimfit.pipelines.pruning import allocate
from trimfit.pipelines.pruning.checkpoint import prune_checkpoint
from trimfit.pipelines.pruning.records import LayerRecord
from trimfit.pipelines.pruning.sensitivity import Probe

PAPER = PruneConfig(sparsity=0.5, selector="wanda", target="layer", guard=False)


def is_expert(record: LayerRecord) -> bool:
    return ".experts." in record.name


def weight(model: PreTrainedModel, record: LayerRecord) -> Tensor:
    """W (out, in) of a record's layer, written independently of the library."""
    if not is_expert(record):
        return model.get_parameter(f"{record.name}.weight").detach()
    owner, expert, name = record.name.rsplit(".", 2)
    stored = model.get_parameter(f"{owner}.{name}").detach()[int(expert)]
    return stored.T if model.config.model_type == "gpt_oss" else stored


def changed(model: PreTrainedModel, dense: PreTrainedModel) -> set[str]:
    """Names of the tensors that are not bit for bit the same."""
    return {name for name, tensor in dense.state_dict().items() if not torch.equal(tensor, model.state_dict()[name])}


def holding(report: PruneReport) -> set[str]:
    """Names of the tensors that hold the weights of the records."""
    experts = {".".join(np.delete(r.name.split("."), -2)) for r in report.layers if is_expert(r)}
    return experts | {f"{r.name}.weight" for r in report.layers if not is_expert(r)}


@for_each(EXPERT_FAMILIES)
def test_half_of_every_expert_and_nothing_else(family: Family):
    model, dense = family.build(), family.build()
    report = prune(model, windows(8), PAPER)
    last = f"{family.stack}.{model.config.num_hidden_layers - 1}."
    assert {r.name.removeprefix(last) for r in report.layers if r.name.startswith(last)} == family.layers
    assert changed(model, dense) == holding(report)  # routers, and all else, are as they were
    for record in report.layers:
        new = weight(model, record)
        assert record.shape == tuple(new.shape) and record.sparsity == 0.5
        assert int((new == 0).sum()) == new.numel() // 2, record.name
        assert record.tokens == 7 * 24 or is_expert(record)
    for block in {r.block for r in report.layers if is_expert(r)}:
        first = [r.tokens for r in report.layers if r.block == block and is_expert(r) and "gate_up" in r.name]
        second = [r.tokens for r in report.layers if r.block == block and is_expert(r) and "down" in r.name]
        assert first == second and sum(first) == 2 * 7 * 24 and len(first) == EXPERTS
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=windows(2)).logits).all()


@for_each(EXPERT_FAMILIES)
def test_half_of_the_model_by_default(family: Family):
    """Joint masks, the dense target, a sparsity split by what errors cost: exact in total."""
    model, dense = family.build(), family.build()
    report = prune(model, windows(8))
    assert changed(model, dense) == holding(report)
    sizes = sum(weight(model, record).numel() for record in report.layers)
    assert sum(int((weight(model, record) == 0).sum()) for record in report.layers) == sizes // 2
    assert len({record.sparsity for record in report.layers}) > 1


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_two_of_four_along_the_inputs(name: str):
    model = EXPERT_FAMILIES[name].build()
    for record in prune(model, windows(4), PruneConfig(pattern="2:4", selector="wanda")).layers:
        rows = weight(model, record)
        assert ((rows.reshape(len(rows), -1, 4) != 0).sum(2) == 2).all()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_weights_are_the_optimum_for_the_tokens_of_the_expert(name: str):
    """The normal equations of each row, in float64, from the inputs in a plain forward pass."""
    model, dense, tokens = EXPERT_FAMILIES[name].build(), EXPERT_FAMILIES[name].build(), windows(8)
    ignored = ("re:self_attn", "re:layers.1")
    report = prune(model, tokens, PAPER.model_copy(update={"ignore": ignored, "held_out": 0.0, "tolerance": 1e-8}))
    inputs = plain_expert_inputs_of_first_block(model, tokens)
    assert len(report.layers) == 2 * EXPERTS
    for record in report.layers:
        x, old, new = inputs[record.name], weight(dense, record).double(), weight(model, record).double()
        gram = x.T @ x / len(x)
        gram += record.damping * gram.diagonal().mean() * torch.eye(len(gram))
        for row, wanted in zip(new, old, strict=True):
            kept = row != 0
            optimum = torch.linalg.solve(gram[kept][:, kept], (gram @ wanted)[kept])
            assert (row[kept] - optimum).norm() <= 1e-3 * optimum.norm()


def plain_expert_inputs_of_first_block(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    return plain_expert_inputs(model, tokens, "model.layers.0.mlp.experts")


def starved(seed: int = 0) -> PreTrainedModel:
    """GPT-OSS, in which no token is routed to expert 3."""
    model = EXPERT_FAMILIES["gpt_oss"].build(seed)
    for block in range(2):
        model.get_parameter(f"model.layers.{block}.mlp.router.bias").data[3] = -1e4
    return model


@pytest.mark.parametrize(
    "options", [{}, {"selector": "sparsegpt", "refit": "own", "allocation": "owl"}, {"damping": "auto"}]
)
def test_an_expert_without_tokens_keeps_its_largest_weights(options: dict[str, str]):
    model, dense = starved(), starved()
    report = prune(model, windows(8), PruneConfig(sparsity=0.5, **options))
    silent = [record for record in report.layers if ".experts.3." in record.name]
    assert len(silent) == 4
    for record in silent:
        assert (record.tokens, record.few_tokens, record.accepted, record.status) == (0, True, "none", None)
        assert record.final.held_out is None
        new, old = weight(model, record), weight(dense, record)
        assert 0 < record.sparsity < 1
        assert torch.equal(new, torch.where(new != 0, old, 0))
        for row, mask in zip(old.abs(), new != 0, strict=True):
            assert row[mask].min() >= row[~mask].max()
    assert all(record.tokens > 0 for record in report.layers if record not in silent)


def test_few_tokens_are_damped_more_and_the_record_says_so():
    report = prune(EXPERT_FAMILIES["mixtral"].build(), windows(8), PAPER)
    for record in report.layers:
        if not is_expert(record):
            assert (record.few_tokens, record.damping) == (False, 0.01)
            continue
        enough = 8 * record.shape[1]
        assert record.few_tokens == (record.tokens < enough)
        assert record.damping == pytest.approx(0.01 * max(1, enough / record.tokens))
    many = prune(EXPERT_FAMILIES["mixtral"].build(), windows(60), PAPER)
    assert any(is_expert(record) and not record.few_tokens and record.damping == 0.01 for record in many.layers)


def test_the_summary_says_so(capsys: pytest.CaptureFixture[str]):
    show.prune(prune(starved(), windows(4), PAPER), CalibrationConfig(), Path("out"), as_json=False)
    said = " ".join(capsys.readouterr().out.split())
    assert "16 layers of experts saw too few tokens for their width and were damped more, 4 of them saw none" in said
    assert "simpler weights" not in said
    dense = prune(EXPERT_FAMILIES["mixtral"].build(), windows(4), PAPER.model_copy(update={"ignore": ("experts.*",)}))
    show.prune(dense, CalibrationConfig(), Path("out"), as_json=False)
    assert "too few tokens" not in capsys.readouterr().out


@pytest.mark.parametrize("capture", ["group", "block"])
def test_experts_are_captured_together_and_alike(capture: str):
    """Side by side none changes what another receives, however many Gram matrices there is room for."""
    config = PAPER.model_copy(update={"capture": capture})
    whole, narrow = EXPERT_FAMILIES["qwen3_moe"].build(), EXPERT_FAMILIES["qwen3_moe"].build()
    prune(whole, windows(4), config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "AT_ONCE", 1)
        prune(narrow, windows(4), config)
    assert not changed(whole, narrow)


def request_files(folder: Path, family: Family) -> CalibrationConfig:
    family.build().bfloat16().save_pretrained(folder / "model", max_shard_size="60KB")
    make_word_tokenizer().save_pretrained(folder / "model")
    np.save(folder / "windows.npy", windows(8).numpy())
    return CalibrationConfig(source=str(folder / "windows.npy"), samples=8, sequence_length=24)


@for_each(EXPERT_FAMILIES)
def test_plain_transformers_loads_it(family: Family, tmp_path: Path):
    """In the form of the source, which has a tensor for each expert in most families, in two files."""
    calibration = request_files(tmp_path, family)
    device = torch.device("cpu")
    report = prune_checkpoint(str(tmp_path / "model"), tmp_path / "out", PAPER, calibration, device=device)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    prune(expected, calibration.windows(make_word_tokenizer(), expected), PAPER)
    assert not changed(loaded, expected)
    for record in report.layers:
        assert int((weight(loaded, record) == 0).sum()) == record.shape[0] * record.shape[1] // 2
    names = [{file.name for file in (tmp_path / part).glob("*.safetensors")} for part in ("model", "out")]
    assert names[0] == names[1]


class Interrupted(Silent):
    """Ends the run after some layers of experts."""

    def layer(self, record: object, done: float) -> None:
        if done > 0.8:
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_goes_on(tmp_path: Path):
    calibration = request_files(tmp_path, EXPERT_FAMILIES["gpt_oss"])
    source, device = str(tmp_path / "model"), torch.device("cpu")
    with pytest.raises(KeyboardInterrupt):
        prune_checkpoint(source, tmp_path / "out", PAPER, calibration, device=device, observer=Interrupted())
    prune_checkpoint(source, tmp_path / "out", PAPER, calibration, device=device)
    prune_checkpoint(source, tmp_path / "whole", PAPER, calibration, device=device)
    resumed, whole = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("out", "whole"))
    assert not changed(resumed, whole)


def frozen_walker(model: PreTrainedModel) -> Walker:
    return Walker(model, find_blocks(model), {"all": windows(6)}, frozen=True, to_the_end=True)


def test_allocation_counts_an_expert_by_the_tokens_it_gets():
    walker = frozen_walker(starved())
    shares: dict[str, float] = {}
    for block in walker:
        for group, moments in allocate._seen(walker, block):
            share = moments.tokens / walker.windows["all"].numel()
            assert (share == 1) == (not group.is_expert)
            shares |= {layer.name: share for layer in group.layers}
        experts = [share for name, share in shares.items() if name.startswith(block.name) and "down_proj" in name]
        assert sum(experts) == pytest.approx(2.0)
        assert experts[3] == 0 < experts[0]
    probe: Any = SimpleNamespace(disturb=lambda block: None, sensitivities=lambda: dict.fromkeys(shares, 3.0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(allocate, "_losses", lambda group, *_: {layer.name: torch.ones(1) for layer in group.layers})
        costs = allocate._costs(frozen_walker(starved()), probe, 0.01)
    assert {name: cost.item() / 3 for name, cost in costs.items()} == pytest.approx(shares)


def given(modules: Sequence[nn.Module], run: Callable[[], None]) -> list[Tensor]:
    """What modules give while something runs."""
    outputs: list[Tensor] = []
    handles = [module.register_forward_hook(lambda m, a, output: outputs.append(output)) for module in modules]
    run()
    for handle in handles:
        handle.remove()
    return outputs


def test_experts_side_by_side_are_probed_together():
    """Each with noise of its own: as many squares as the noise in the outputs of all of them has."""
    model = starved()
    walker = frozen_walker(model)
    probe = Probe(walker, "all")
    squares: dict[str, float] = {}
    for block in walker:
        probe.disturb(block)
        for name in ("gate_up_proj", "down_proj"):
            linears = [layer.module for layer in block.layers if layer.parameter.endswith(f"experts.{name}")]
            outputs = given(linears, partial(walker.branch, block, "all", f"{block.name}.{name}"))
            squares[f"{block.name}.mlp.experts.0.{name}"] = 0.01 * sum(y.square().sum().item() for y in outputs)
    for name, total in squares.items():
        assert probe._noise[name] == pytest.approx(total, rel=0.1)
    found = probe.sensitivities()
    assert found.keys() == {layer.name for block in walker.blocks for layer in block.layers}
    for block in walker.blocks:
        for name in ("gate_up_proj", "down_proj"):
            assert len({found[f"{block.name}.mlp.experts.{i}.{name}"] for i in range(EXPERTS)}) == 1


def test_one_block_in_memory(tmp_path: Path):
    """For families whose files hold experts in one tensor as the model does; of others every tensor is converted."""
    calibration = request_files(tmp_path, EXPERT_FAMILIES["gpt_oss"])
    source, device = str(tmp_path / "model"), torch.device("cpu")
    for name, offload in (("out", True), ("whole", False)):
        prune_checkpoint(source, tmp_path / name, PAPER, calibration, device=device, offload=offload)
    offloaded, whole = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype="auto") for name in ("out", "whole")
    )
    assert not changed(offloaded, whole)
