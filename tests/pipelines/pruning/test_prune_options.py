"""What watches over a refit, and what rows of Q and K count, on tiny models."""

from typing import Any

import pytest
import torch
from families import ALL_FAMILIES, FAMILIES, OWN_ATTENTION, Family, for_each, matrix, windows
from pydantic import ValidationError
from torch import Tensor

from trimfit import InputError, PruneConfig, prune
from trimfit.models import Walker, find_blocks, find_query_key
from trimfit.pipelines.pruning.damping import CANDIDATES
from trimfit.pipelines.pruning.goal import Goal
from trimfit.pipelines.pruning.layer import row_scale
from trimfit.pipelines.pruning.records import LayerRecord
from trimfit.pipelines.pruning.shared import shared_refit
from trimfit.ranks import ALONE
from trimfit.refit import Auto, ConjugateGradients, FactoredGram, refit_together

FEW = windows(8)  # 7 windows of 24 random tokens to fit on: some refits of random layers fit them too closely


def test_a_refit_that_does_not_hold_on_held_out_windows_is_not_accepted():
    model, dense = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    report = prune(model, FEW, PruneConfig(selector="wanda", target="layer"))
    refused = [record for record in report.layers if record.accepted == "none"]
    assert 0 < len(refused) < len(report.layers)
    for record in refused:
        new, old = (matrix(m.get_submodule(record.name)) for m in (model, dense))
        assert torch.equal(new, torch.where(new != 0, old, 0))
        assert record.final == record.masked
        assert (record.certificate, record.status, record.solver, record.steps) == (None, None, None, None)
    unguarded = prune(FAMILIES["llama"].build(), FEW, PruneConfig(selector="wanda", target="layer", guard=False))
    assert {record.accepted for record in unguarded.layers} == {"optimal"}
    first = next(record for record in refused if record.block == 0)
    refitted = next(record for record in unguarded.layers if record.name == first.name)
    assert first.final.held_out is not None and refitted.final.held_out is not None
    assert first.final.held_out < refitted.final.held_out
    assert first.final.calibration > refitted.final.calibration


def test_nothing_is_refused_where_nothing_is_held_out():
    report = prune(FAMILIES["llama"].build(), FEW, PruneConfig(selector="wanda", held_out=0))
    assert {record.accepted for record in report.layers} == {"optimal"}


def test_damping_is_chosen_on_held_out_windows():
    """Where a guard had to step in with few tokens, more damping does; with more tokens less of it is chosen."""
    few = prune(FAMILIES["llama"].build(), FEW, PruneConfig(damping="auto", selector="wanda"))
    many = prune(FAMILIES["llama"].build(), windows(128), PruneConfig(damping="auto", selector="wanda"))
    chosen = [[record.damping for record in report.layers] for report in (few, many)]
    assert {*chosen[0], *chosen[1]} <= set(CANDIDATES)
    assert sum(chosen[0]) > sum(chosen[1])


def test_no_damping_beside_the_chosen_one_is_better_on_held_out_windows():
    """Of the first layers, whose inputs no choice before them changes; with few tokens it is far from the default."""

    def errors(damping: float | str) -> tuple[float, float]:
        config = PruneConfig(damping=damping, selector="wanda", target="layer", guard=False, solver="cholesky")
        first = prune(FAMILIES["llama"].build(), FEW, config).layers[:3]
        return first[0].damping, sum(record.final.held_out or 0 for record in first)

    chosen, error = errors("auto")
    at = CANDIDATES.index(chosen)
    assert chosen > 0.01
    for beside in CANDIDATES[max(at - 1, 0) : at + 2]:
        assert error <= errors(beside)[1] * 1.001  # trial refits are rough


def test_damping_cannot_be_chosen_without_held_out_windows():
    with pytest.raises(ValidationError, match="damping 'auto' is chosen on held-out windows"):
        PruneConfig(damping="auto", held_out=0)
    model = FAMILIES["llama"].build()
    with pytest.raises(InputError, match=r"a share of 0\.125 of 1 windows is none"):
        prune(model, windows(1), PruneConfig(damping="auto"))


@pytest.mark.parametrize("name", ["phi3", "gpt2", "gpt_neox"])
def test_no_pair_where_one_layer_makes_q_and_k(name: str):
    model = ALL_FAMILIES[name].build()
    assert find_query_key(model, find_blocks(model)[0]) is None


def test_rows_that_count_less_keep_less():
    """Of Q, the rows of the head whose K is made small."""
    model = FAMILIES["llama"].build(num_key_value_heads=4, num_attention_heads=4)
    key = model.get_submodule("model.layers.0.self_attn.k_proj")
    with torch.no_grad():
        key.weight[:8] *= 0.01
    kept: dict[str, int] = {}
    for row_weights in ("equal", "attention"):
        pruned = FAMILIES["llama"].build(num_key_value_heads=4, num_attention_heads=4)
        pruned.load_state_dict(model.state_dict())
        config = {"selector": "sparsegpt", "row_weights": row_weights, "refit": "none"}
        prune(pruned, FEW, PruneConfig.model_validate(config))
        kept[row_weights] = int((matrix(pruned.get_submodule("model.layers.0.self_attn.q_proj"))[:8] != 0).sum())
    assert kept["attention"] < kept["equal"] / 2


def test_rows_are_weighed_by_the_root_of_what_they_count():
    metric = torch.diag_embed(torch.tensor([[1.0, 4.0], [9.0, 16.0]])) + 0.5  # what rows share counts for neither
    counts = torch.tensor([1.5, 4.5, 9.5, 16.5]).sqrt()
    torch.testing.assert_close(row_scale(metric)[:, 0], counts / counts.mean())
    assert row_scale(torch.zeros(1, 3, 3)).flatten().tolist() == [1, 1, 1]
    assert row_scale(torch.diag_embed(torch.tensor([[0.0, 2.0]])))[0] == pytest.approx(1e-4)  # and does not vanish


@for_each(OWN_ATTENTION)
def test_attention_that_is_called_in_another_way_is_no_obstacle(family: Family):
    report = prune(family.build(), FEW, PruneConfig())
    weighed = {record.name.rpartition("layers.")[2] for record in report.layers if record.rows == "attention"}
    blocks = (0,) if family.name == "minimax_m3_vl_text" else (0, 1)  # in the other it chooses its keys
    assert weighed == {f"{block}.self_attn.{name}" for block in blocks for name in ("q_proj", "k_proj")}


def test_old_records_had_equal_rows():
    record = prune(FAMILIES["llama"].build(), FEW, PruneConfig(selector="wanda")).layers[0]
    assert record.rows == "equal"
    assert LayerRecord.model_validate(record.model_dump(exclude={"rows"})) == record


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({"pattern": "2:4"}, True),
        ({"pattern": "2:4", "refit": "none"}, False),
        ({"refit": "none"}, True),  # rows compete
        ({"refit": "none", "scope": "row"}, False),
        ({"refit": "own", "pattern": "2:4"}, True),  # the guard compares
        ({"refit": "own", "pattern": "2:4", "guard": False}, False),
        ({"selector": "wanda"}, False),
    ],
    ids=str,
)
def test_the_curvature_is_found_where_it_is_used(options: dict[str, Any], asked: bool, monkeypatch: pytest.MonkeyPatch):
    found: list[str] = []
    own = Walker.logit_curvature

    def curvature(self: Walker, *arguments: Any) -> dict[str, Tensor]:
        found.append("once")
        return own(self, *arguments)

    monkeypatch.setattr(Walker, "logit_curvature", curvature)
    prune(FAMILIES["llama"].build(), FEW, PruneConfig.model_validate(options))
    assert len(found) == (2 if asked else 0)  # blocks


def test_weights_of_q_and_k_are_accepted_in_the_metric_they_were_refitted_in(monkeypatch: pytest.MonkeyPatch):
    weighed: list[tuple[int, int]] = []
    own = Goal.excess

    def excess(self: Goal, weight: Tensor, metric: Tensor | None = None) -> float:
        if metric is not None:
            assert metric.shape[0] * metric.shape[1] == len(weight)
            weighed.append((metric.shape[0], len(weight)))
        return own(self, weight, metric)

    monkeypatch.setattr(Goal, "excess", excess)
    prune(FAMILIES["llama"].build(), FEW, PruneConfig(pattern="2:4"))
    assert {*weighed} == {(4, 32), (2, 16)}


def test_chunks_of_heads_have_their_own_metrics():
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(200, 16, generator=generator), torch.randn(240, 16, generator=generator)
    factor = torch.randn(20, 12, 12, generator=generator, dtype=torch.float64)  # chunks of 72 rows
    gram, mask, metric = FactoredGram(inputs.T @ inputs / 200, 0.01), weight.abs() > 0.6, factor @ factor.mT
    weight = weight.double()
    whole = refit_together(gram, weight, mask, metric, solver=ConjugateGradients(tolerance=1e-10))
    parts = shared_refit(gram, weight, mask, target=None, start=None, solver=Auto(1e-10), metric=metric, ranks=ALONE)
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-3, atol=1e-3)
    assert parts.certificate.gap.shape == (20,)


def test_inference_mode_around_it_changes_nothing():
    plain, inside = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    prune(plain, FEW, PruneConfig())
    with torch.inference_mode():
        prune(inside, FEW.clone(), PruneConfig())
        assert torch.is_inference_mode_enabled()
    for name, tensor in inside.state_dict().items():
        assert torch.equal(tensor, plain.state_dict()[name])


def test_a_model_made_in_inference_mode_is_refused_where_that_matters():
    with torch.inference_mode():
        model = FAMILIES["llama"].build()
        with pytest.raises(InputError, match=r"were made under torch\.inference_mode\(\).*row_weights 'equal'"):
            prune(model, FEW, PruneConfig())
        prune(model, FEW, PruneConfig(row_weights="equal"))
