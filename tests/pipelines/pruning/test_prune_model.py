"""What `prune` computes, against independent solutions from independently captured inputs."""

import json
from typing import Any

import pytest
import torch
from families import FAMILIES, matrix, plain_grams, plain_inputs, windows
from pydantic import ValidationError
from refusals import BAD_MODELS, BAD_TOKENS, TOKENS, Refused, is_equal, state
from torch import Tensor
from transformers import PreTrainedModel

from trimfit import PruneConfig, PruneReport, prune
from trimfit.masks import SELECTORS
from trimfit.pipelines.pruning.records import LayerRecord

FIT, HELD_OUT = TOKENS[:6], TOKENS[6:]  # held_out=0.25
EXACT: dict[str, Any] = {"tolerance": 1e-10, "solver": "cholesky", "held_out": 0.25, "batch_size": 4}
PLAIN: dict[str, Any] = {"selector": "sparsegpt", "target": "layer", "guard": False}  # the paper's own problem
EXACT |= PLAIN


def solve(gram: Tensor, dense: Tensor, mask: Tensor, damping: float = 0.01) -> Tensor:
    """The optimal weights, row by row in float64: H_SS w_S = (W H)_S with the damped H."""
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    weight = torch.zeros_like(dense, dtype=torch.float64)
    for row, kept in enumerate(mask):
        goal = dense[row].double() @ damped
        weight[row, kept] = torch.linalg.solve(damped[kept][:, kept], goal[kept])
    return weight


def relative_error(dense: Tensor, weight: Tensor, inputs: Tensor) -> float:
    """‖X(Ŵ − W)ᵀ‖² / ‖XWᵀ‖²."""
    dense, weight = dense.double(), weight.double()
    return ((inputs @ (weight - dense).T).square().sum() / (inputs @ dense.T).square().sum()).item()


def weight_of(model: PreTrainedModel, name: str) -> Tensor:
    return matrix(model.get_submodule(name))


def copy_layers(source: PreTrainedModel, target: PreTrainedModel, names: list[str]) -> None:
    for name in names:
        target.get_submodule(name).load_state_dict(source.get_submodule(name).state_dict())


def first_block(name: str) -> list[list[str]]:
    family = FAMILIES[name]
    return [[f"{family.stack}.0.{layer}" for layer in group] for group in family.groups]


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "opt", "gpt2"])
@pytest.mark.parametrize("capture", ["group", "block"])
def test_weights_are_optimal_for_the_inputs_they_get(name: str, capture: str):
    """Each group of the first block: inputs from a plain model in which the groups before it are pruned, or none."""
    model, reference = FAMILIES[name].build(), FAMILIES[name].build()
    prune(model, TOKENS, PruneConfig.model_validate(EXACT | {"sparsity": 0.5, "capture": capture}))
    dense = FAMILIES[name].build()
    for group in first_block(name):
        grams = plain_grams(reference, FIT, group)
        for layer in group:
            pruned = weight_of(model, layer)
            expected = solve(grams[layer], weight_of(dense, layer), pruned != 0)
            torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)
        if capture == "group":
            copy_layers(model, reference, group)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2"])
def test_the_second_block_sees_the_first_one_pruned(name: str):
    model, reference, dense = (FAMILIES[name].build() for _ in range(3))
    prune(model, TOKENS, PruneConfig.model_validate(EXACT | {"sparsity": 0.5}))
    copy_layers(model, reference, [layer for group in first_block(name) for layer in group])
    group = [layer.replace(".0.", ".1.", 1) for layer in first_block(name)[0]]
    for layer in group:
        pruned = weight_of(model, layer)
        gram = plain_grams(reference, FIT, [layer])[layer]
        expected = solve(gram, weight_of(dense, layer), pruned != 0)
        torch.testing.assert_close(pruned.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("solver", ["auto", "cholesky", "cg", "cg-diagonal"])
def test_all_solvers_agree(solver: str):
    reference, model = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    options = {"sparsity": 0.5, "selector": "wanda"}
    prune(reference, TOKENS, PruneConfig.model_validate(EXACT | options))
    report = prune(model, TOKENS, PruneConfig.model_validate(EXACT | options | {"solver": solver, "tolerance": 1e-8}))
    for layer in first_block("llama")[0]:
        torch.testing.assert_close(weight_of(model, layer), weight_of(reference, layer), rtol=1e-3, atol=1e-4)
    names = {"cholesky": {"Cholesky"}, "cg": {"ConjugateGradients"}, "cg-diagonal": {"ConjugateGradients"}}
    assert {record.solver for record in report.layers} <= names.get(solver, {"Cholesky", "ConjugateGradients"})


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_errors_are_those_of_the_outputs(name: str):
    """On calibration and on held-out windows, from the layers' outputs themselves and not from Gram matrices."""
    model, dense = FAMILIES[name].build(), FAMILIES[name].build()
    report = prune(model, TOKENS, PruneConfig(sparsity=0.5, held_out=0.25))
    records = {record.name: record for record in report.layers}
    group = first_block(name)[0]
    fit, held_out = plain_inputs(dense, FIT, group), plain_inputs(dense, HELD_OUT, group)
    for layer in group:
        old, new = weight_of(dense, layer), weight_of(model, layer)
        masked = torch.where(new != 0, old, 0)
        record = records[layer]
        assert record.final.held_out is not None and record.masked.held_out is not None
        assert record.final.calibration == pytest.approx(relative_error(old, new, fit[layer]), rel=1e-4)
        assert record.stored.calibration == pytest.approx(record.final.calibration, rel=1e-6)
        assert record.final.held_out == pytest.approx(relative_error(old, new, held_out[layer]), rel=1e-4)
        assert record.masked.calibration == pytest.approx(relative_error(old, masked, fit[layer]), rel=1e-4)
        assert record.masked.held_out == pytest.approx(relative_error(old, masked, held_out[layer]), rel=1e-4)


def test_held_out_windows_are_not_fitted():
    """Other tokens in the held-out windows change no weight, but the errors reported there."""
    first, second = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    config = PruneConfig(held_out=0.25, guard=False)
    one = prune(first, TOKENS, config)
    two = prune(second, torch.cat((FIT, windows(2, seed=9))), config)
    assert is_equal(first.state_dict(), second.state_dict())
    for a, b in zip(one.layers, two.layers, strict=True):
        assert a.final.calibration == b.final.calibration
        assert a.final.held_out != b.final.held_out


def test_nothing_held_out():
    report = prune(FAMILIES["llama"].build(), TOKENS, PruneConfig(held_out=0))
    assert (report.windows, report.held_out_windows) == (8, 0)
    assert all(record.final.held_out is None for record in report.layers)
    assert report.mean_error().held_out is None


@pytest.mark.parametrize("name", FAMILIES)
def test_refit_beats_the_mask_alone(name: str):
    """In the first block, where the mask is the same: against a run without refit."""
    plain = prune(FAMILIES[name].build(), TOKENS, PruneConfig(selector="wanda", refit="none", target="layer"))
    fitted = prune(FAMILIES[name].build(), TOKENS, PruneConfig(selector="wanda", target="layer", guard=False))
    for without, refitted in zip(plain.layers, fitted.layers, strict=True):
        assert without.final == without.masked
        assert (without.certificate, without.status, without.solver, without.steps) == (None, None, None, None)
        assert refitted.final.calibration < refitted.masked.calibration
        if refitted.name in first_block(name)[0]:
            assert refitted.masked == without.masked
        if refitted.block == 0:
            assert refitted.final.calibration < without.final.calibration
    assert plain.certificate is None


_WAYS = [
    (name, refit)
    for name, selector in SELECTORS.items()
    for refit in ("optimal", "none", *(["own"] if selector.updates_weights else []))
]


@pytest.mark.parametrize(("selector", "refit"), _WAYS)
@pytest.mark.parametrize("pattern", [None, "2:4", "1:2"])
def test_every_selector_with_every_refit(selector: str, refit: str, pattern: str | None):
    model, dense = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].build()
    sparsity = None if pattern else 0.3
    report = prune(
        model,
        TOKENS,
        PruneConfig.model_validate(
            {
                "selector": selector,
                "refit": refit,
                "pattern": pattern,
                "sparsity": sparsity,
                "allocation": "uniform",
                "guard": False,
                "reorder": False,  # so that weights are where they were
            }
        ),
    )
    share, total = (0.5 if pattern else 0.3), 0
    for record in report.layers:
        old, new = weight_of(dense, record.name), weight_of(model, record.name)
        kept = new != 0
        total += int((~kept).sum())
        assert abs(int((~kept).sum()) - share * new.numel()) < 1  # up or down, so that the total is exact
        assert record.sparsity == pytest.approx(int((~kept).sum()) / new.numel())
        assert torch.equal(new[kept], old[kept]) == (refit == "none")
        assert record.final.calibration <= record.masked.calibration
        if pattern:
            m = int(pattern[-1])
            assert (kept.reshape(len(kept), -1, m).sum(2) == m // 2).all()
    assert total == round(share * sum(weight_of(model, record.name).numel() for record in report.layers))


@pytest.mark.parametrize("scope", ["row", "layer"])
def test_scope(scope: str):
    model = FAMILIES["llama"].build()
    report = prune(model, TOKENS, PruneConfig.model_validate({"selector": "magnitude", "scope": scope}))
    for record in report.layers:
        counts = (weight_of(model, record.name) == 0).sum(1)
        assert int(counts.sum()) == record.shape[0] * record.shape[1] // 2
        assert (counts == record.shape[1] // 2).all() == (scope == "row")


def test_sparsity_zero_changes_nothing():
    model = FAMILIES["llama"].build()
    before = state(model)
    report = prune(model, TOKENS, PruneConfig(sparsity=0))
    assert report.sparsity == 0
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-6)


def test_ignored_layers_stay_dense():
    model, dense = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    report = prune(model, TOKENS, PruneConfig(ignore=("k_proj", "re:layers.0.*down", "lm_head")))
    left = [r.name for r in report.layers]
    assert len(left) == 2 * 7 - 2 - 1
    for name, module in dense.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert torch.equal(weight_of(model, name), matrix(module)) == (name not in left)


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2"])
def test_twice_the_same_bits(name: str):
    models = [FAMILIES[name].build() for _ in range(2)]
    reports = [prune(model, TOKENS, PruneConfig()) for model in models]
    assert is_equal(models[0].state_dict(), models[1].state_dict())
    timeless = [
        [record.model_copy(update={"seconds": 0, "peak_memory": 0}) for record in report.layers] for report in reports
    ]
    assert timeless[0] == timeless[1]


def test_the_size_of_batches_does_not_matter():
    results: list[Tensor] = []
    for batch_size in (1, 3, 100):
        model = FAMILIES["llama"].build()
        prune(model, TOKENS, PruneConfig(selector="wanda", batch_size=batch_size))
        results.append(weight_of(model, "model.layers.0.self_attn.q_proj"))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(results[0], results[2], rtol=1e-3, atol=1e-4)


def test_dead_inputs_get_no_weight():
    """Hidden units that no token reaches: their weights go, whatever the mask says, and nothing fails."""
    model = FAMILIES["opt"].build()
    with torch.no_grad():
        model.get_submodule("model.decoder.layers.0.fc1").get_parameter("bias")[:5] = -1e6
    report = prune(model, TOKENS, PruneConfig(allocation="uniform", guard=False))
    weight = weight_of(model, "model.decoder.layers.0.fc2")
    assert (weight[:, :5] == 0).all()
    assert int((weight == 0).sum()) >= weight.numel() // 2
    assert all(record.status == "optimal" for record in report.layers)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_tokens_may_be_any_integers(dtype: torch.dtype):
    model, other = FAMILIES["llama"].build(), FAMILIES["llama"].build()
    prune(model, TOKENS.to(dtype))
    prune(other, TOKENS)
    assert is_equal(model.state_dict(), other.state_dict())


def test_one_window():
    report = prune(FAMILIES["llama"].build(), windows(1), PruneConfig())
    assert (report.windows, report.held_out_windows) == (1, 0)


def test_the_default_is_half_of_every_layer():
    report = prune(FAMILIES["llama"].build(), TOKENS)
    assert report.config == PruneConfig()
    assert report.sparsity == 0.5


def test_the_model_may_be_in_training_mode():
    model, other = FAMILIES["gpt2"].build(), FAMILIES["gpt2"].build()  # has dropout
    prune(other, TOKENS)
    model.train()
    prune(model, TOKENS)
    assert model.training
    assert is_equal(model.state_dict(), other.state_dict())


class _Recorder:
    def __init__(self) -> None:
        self.stages: list[str] = []
        self.layers: list[tuple[LayerRecord, float]] = []

    def stage(self, text: str) -> None:
        self.stages.append(text)

    def layer(self, record: LayerRecord, done: float) -> None:
        self.layers.append((record, done))


@pytest.mark.parametrize("capture", ["group", "block"])
def test_the_observer_hears_of_every_layer(capture: str):
    observer = _Recorder()
    config = PruneConfig.model_validate({"ignore": ("layers.1.*",), "capture": capture})
    report = prune(FAMILIES["gemma2"].build(), TOKENS, config, observer=observer)
    assert [record for record, _ in observer.layers] == report.layers
    shares = [done for _, done in observer.layers]
    assert shares == sorted(shares) and shares[-1] == 1 and shares[0] > 0
    assert observer.stages == [
        "allocating the sparsity (error)",
        "reading the calibration windows",
        "block 1 of 2",
        "block 2 of 2",
    ]


def test_a_report_survives_json():
    report = prune(FAMILIES["llama"].build(), TOKENS, PruneConfig(ignore=("k_proj",)))
    assert PruneReport.model_validate_json(report.model_dump_json()) == report
    assert PruneReport.model_validate(json.loads(json.dumps(report.model_dump(), allow_nan=False))) == report
    assert set(report.versions) == {"python", "trimfit", "torch", "transformers", "safetensors", "numpy"}


_BAD_WIDTHS = {
    "width": Refused(
        r"model\.layers\.0\.self_attn\.q_proj: 32 inputs cannot be split into groups of 5 for the pattern 3:5",
        {"pattern": "3:5"},
    ),
    "width of the last layer": Refused(
        r"model\.layers\.0\.mlp\.down_proj: 48 inputs cannot be split into groups of 32", {"pattern": "4:32"}
    ),
}
_REFUSED = BAD_MODELS | BAD_TOKENS | _BAD_WIDTHS


@pytest.mark.parametrize("case", _REFUSED)
def test_nothing_changes_when_refused(case: str):
    _REFUSED[case].check(
        lambda model, tokens, options: prune(
            model, TOKENS if tokens is None else tokens, PruneConfig.model_validate(options)
        )
    )


_BAD_OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "all": ({"sparsity": 1.0}, "less than 1"),
    "negative": ({"sparsity": -0.1}, "greater than or equal to 0"),
    "not a number": ({"sparsity": float("nan")}, "sparsity"),
    "both": ({"sparsity": 0.5, "pattern": "2:4"}, "give sparsity or pattern, not both"),
    "no pattern": ({"pattern": "half"}, "cannot read the pattern 'half': write N:M"),
    "reversed": ({"pattern": "4:2"}, "the pattern 4:2 is impossible"),
    "everything": ({"pattern": "4:4"}, "the pattern 4:4 keeps every weight"),
    "scope": ({"pattern": "2:4", "scope": "row"}, "scope belongs to an unstructured sparsity"),
    "other scope": ({"scope": "column"}, "'row' or 'layer'"),
    "selector": ({"selector": "best"}, "unknown selector 'best': choose one of " + ", ".join(SELECTORS)),
    "own": ({"selector": "wanda", "refit": "own"}, "the selector wanda has no weight update of its own"),
    "refit": ({"refit": "some"}, "'optimal', 'own' or 'none'"),
    "solver": ({"solver": "qp"}, "'auto', 'cholesky', 'cg' or 'cg-diagonal'"),
    "tolerance": ({"tolerance": 0}, "greater than 0"),
    "damping": ({"damping": -1}, "greater than or equal to 0"),
    "capture": ({"capture": "model"}, "'group' or 'block'"),
    "held out": ({"held_out": 1.0}, "less than 1"),
    "batch": ({"batch_size": 0}, "greater than or equal to 1"),
    "unknown": ({"sparcity": 0.5}, "Extra inputs are not permitted"),
}


@pytest.mark.parametrize("case", _BAD_OPTIONS)
def test_bad_options(case: str):
    options, message = _BAD_OPTIONS[case]
    with pytest.raises(ValidationError) as error:
        PruneConfig.model_validate(options)
    assert message in str(error.value)


def test_a_config_is_frozen_and_survives_json():
    config = PruneConfig(pattern="2:4", ignore=("lm_head", "re:x"), capture="block")
    assert PruneConfig.model_validate_json(config.model_dump_json()) == config
    with pytest.raises(ValidationError, match="frozen"):
        config.sparsity = 0.7
