"""Every family at 50 %: every linear layer of every block is pruned, and nothing else changes."""

import pytest
import torch
from families import EVERYTHING, FAMILIES, Family, for_each, matrix, vision_language_model, windows

from trimfit import PruneConfig, prune


@for_each(EVERYTHING)
def test_half_of_every_layer_and_nothing_else(family: Family):
    model, dense = family.build(), family.build()
    report = prune(model, windows(8), PruneConfig(sparsity=0.5, selector="sparsegpt", target="layer", guard=False))

    blocks = model.config.num_hidden_layers
    names = [f"{family.stack}.{i}.{name}" for i in range(blocks) for group in family.groups for name in group]
    weights = {f"{name}.weight" for name in names}
    before, after = dense.state_dict(), model.state_dict()
    assert weights < before.keys()
    for name, tensor in before.items():
        if name in weights:
            assert int((after[name] == 0).sum()) == tensor.numel() // 2, name
        else:
            assert torch.equal(after[name], tensor), name

    with torch.no_grad():
        old, new = dense(input_ids=windows(2)).logits, model(input_ids=windows(2)).logits
    assert torch.isfinite(new).all()
    assert not torch.allclose(old, new, atol=1e-2)

    assert [record.name for record in report.layers] == names
    assert (report.windows, report.held_out_windows, report.window_length) == (7, 1, 24)
    assert report.sparsity == 0.5
    assert report.certificate == max(record.certificate or 0 for record in report.layers)
    for record in report.layers:
        assert record.block == int(record.name.removeprefix(f"{family.stack}.").partition(".")[0])
        assert record.shape == tuple(matrix(model.get_submodule(record.name)).shape)
        assert record.sparsity == 0.5
        assert 0 < record.final.calibration < record.masked.calibration < 1
        assert record.accepted == "optimal"
        assert record.final.held_out is not None and record.final.held_out > 0
        assert record.stored.calibration == pytest.approx(record.final.calibration)
        assert record.certificate is not None and 0 <= record.certificate <= 1e-4
        assert record.worst_row is not None and record.certificate <= record.worst_row <= 1e-4
        assert (record.status, record.damping) == ("optimal", 0.01)
        assert record.solver in ("Cholesky", "ConjugateGradients")
        assert record.steps is not None and record.steps >= 1
        assert record.seconds > 0
        assert record.peak_memory > 2**20


@for_each(EVERYTHING)
def test_half_of_the_model_by_default(family: Family):
    """Joint masks, the dense target, layers that share the sparsity unevenly: exact in total; all else stays."""
    model, dense = family.build(), family.build()
    report = prune(model, windows(8), PruneConfig(sparsity=0.5))
    weights = {f"{record.name}.weight" for record in report.layers}
    assert {name.partition(f"{family.stack}.")[2].partition(".")[2] for name in weights} == {
        f"{name}.weight" for name in family.layers
    }
    after, zeros = model.state_dict(), 0
    for name, tensor in dense.state_dict().items():
        if name in weights:
            zeros += int((after[name] == 0).sum())
        else:
            assert torch.equal(after[name], tensor), name
    assert zeros == sum(after[name].numel() for name in weights) // 2
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=windows(2)).logits).all()
    for record in report.layers:
        assert (record.certificate is None) == (record.accepted != "optimal")
        assert record.certificate is None or 0 <= record.certificate <= 1e-4


@for_each(FAMILIES)
def test_two_of_four_along_the_inputs(family: Family):
    model = family.build()
    report = prune(model, windows(4), PruneConfig(pattern="2:4", selector="wanda"))
    for record in report.layers:
        weight = matrix(model.get_submodule(record.name))
        assert ((weight.reshape(len(weight), -1, 4) != 0).sum(2) == 2).all()


@for_each(FAMILIES)
def test_bfloat16(family: Family):
    model = family.build().bfloat16()
    report = prune(model, windows(4), PruneConfig(sparsity=0.5, selector="wanda", target="layer", guard=False))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16, name
    for record in report.layers:
        weight = matrix(model.get_submodule(record.name))
        assert int((weight == 0).sum()) == weight.numel() // 2
        assert record.final.calibration < record.masked.calibration
        # Rounding to bfloat16 errs by less than 2⁻⁸ of each weight, which the error of pruning outweighs.
        assert record.stored.calibration != record.final.calibration
        assert record.stored.calibration == pytest.approx(record.final.calibration, rel=0.05, abs=1e-4)


def test_the_text_part_of_a_vision_language_model():
    model, dense = vision_language_model(), vision_language_model()
    report = prune(model, windows(4), PruneConfig())
    assert len(report.layers) == 4 * 7
    changed = {name for name, p in dense.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert changed == {f"{record.name}.weight" for record in report.layers}
    assert all(name.startswith("model.language_model.layers.") for name in changed)
