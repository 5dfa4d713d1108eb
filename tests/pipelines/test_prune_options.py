"""What watches over a refit, and what rows of Q and K count, on tiny models."""

import pytest
import torch
from families import ALL_FAMILIES, FAMILIES, matrix, windows
from pydantic import ValidationError

from trimfit import InputError, PruneConfig, prune
from trimfit.models import find_blocks, find_query_key
from trimfit.pipelines.damping import CANDIDATES
from trimfit.pipelines.prune_layer import row_scale

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
