"""Where a refit begins changes how long it takes, not what it finds or what its certificate says."""

import pytest
import torch
from refit_reference import Reference, make_layer

from trimfit import ConjugateGradients, InputError, Status, refit
from trimfit.refit import Solver

SOLVER: Solver = ConjugateGradients("masked_inverse")


@pytest.mark.parametrize("dense_target", [False, True])
def test_any_start_ends_at_the_optimum_with_a_valid_certificate(dense_target: bool):
    gram, weight, mask = make_layer(7, 24, decay=1.0)
    target = weight @ (gram + 0.1 * gram.roll(1, 0)) if dense_target else None
    reference = Reference(gram, weight, mask, target, 0.01)
    for start in (reference.optimum, weight, -1e3 * weight, torch.zeros_like(weight)):
        solution = refit(gram, weight, mask, target=target, start=start, damping=0.01, solver=SOLVER)
        gap = reference.gap(solution.weight)
        assert solution.status is Status.OPTIMAL
        assert not solution.weight[~mask].any()
        assert (solution.certificate.gap >= gap).all()
        assert (gap <= 1e-4 * reference.gain).all()
        # The gain is over the masked weights, wherever the solver began.
        torch.testing.assert_close(solution.certificate.gain, reference.gain - gap, rtol=1e-5, atol=0)


def test_the_optimum_needs_no_step_and_near_it_few_are_needed():
    gram, weight, mask = make_layer(7, 24, decay=1.0)
    optimum = Reference(gram, weight, mask, damping=0.01).optimum
    cold = refit(gram, weight, mask, damping=0.01, solver=SOLVER)
    near = refit(gram, weight, mask, damping=0.01, start=optimum + 0.01 * (weight - optimum), solver=SOLVER)
    again = refit(gram, weight, mask, damping=0.01, start=cold.weight, solver=SOLVER)
    assert again.steps == 0
    assert torch.equal(again.weight, cold.weight)
    assert near.steps < cold.steps


def test_never_worse_than_the_masked_weights_however_bad_the_start():
    gram, weight, mask = make_layer(7, 24, decay=1.0)
    reference = Reference(gram, weight, mask, damping=0.01)
    hurried = ConjugateGradients("masked_inverse", max_steps=1)
    solution = refit(gram, weight, mask, start=-1e3 * weight, damping=0.01, solver=hurried)
    assert solution.status is Status.STEP_LIMIT
    assert (reference.gap(solution.weight) <= reference.gain).all()


def test_chunks_take_their_own_part_of_the_start(chunked: None):
    gram, weight, mask = make_layer(7, 24)
    cold = refit(gram, weight, mask, damping=0.01, solver=SOLVER)
    assert refit(gram, weight, mask, damping=0.01, start=cold.weight, solver=SOLVER).steps == 0


def test_a_start_that_cannot_be_one_is_refused():
    gram, weight, mask = make_layer(3, 6)
    with pytest.raises(InputError, match="the start must be floating"):
        refit(gram, weight, mask, start=weight[:2])
    with pytest.raises(InputError, match="the start must be floating"):
        refit(gram, weight, mask, start=mask.int())
    with pytest.raises(InputError, match="the start has NaN"):
        refit(gram, weight, mask, start=weight / 0)
