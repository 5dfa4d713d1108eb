"""Transformations of pairs: exact, optimal where that can be proven, and harmless where a head has little to say."""

import pytest
import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant.hadamard import mixing_matrix
from trimfit.quant.pairs import balanced_transform, paper_transform

SHAPES = [(3, 40, 8, 24), (2, 30, 12, 50), (1, 20, 7, 9), (2, 200, 64, 130)]  # heads, p, r, n


def make_pair(heads: int, p: int, r: int, n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A and B whose channels differ in size, and weights of the inputs."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(heads, p, r, generator=generator, dtype=torch.float64)
    b = torch.randn(heads, r, n, generator=generator, dtype=torch.float64)
    sizes = torch.logspace(0, -1.5, r, dtype=torch.float64)
    mixing = torch.randn(heads, r, r, generator=generator, dtype=torch.float64)
    return a * sizes @ mixing, b * sizes[:, None].flip(0), torch.rand(n, generator=generator, dtype=torch.float64)


def transformed(m: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return torch.linalg.solve(m, a, left=False), m @ b


def surrogate(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both terms of the second-moment model of the product's error, for each head."""
    columns, rows = a.square().sum(1), b.square().sum(2)
    return columns.sum(1) * rows.sum(1) / a.shape[-1], (columns * rows).sum(1)


def lower_bound(a: Tensor, b: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(a @ b, "nuc").square() / a.shape[-1]


def test_the_mixing_matrix_is_orthogonal_and_flat():
    for n in [*range(1, 131), 172]:
        mixing = mixing_matrix(n, torch.float64, "cpu")
        torch.testing.assert_close(mixing @ mixing.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-13)
        largest = mixing.abs().max().item() * n**0.5
        assert largest <= 2**0.5
        if n & (n - 1) == 0:
            torch.testing.assert_close(mixing.abs(), torch.full_like(mixing, n**-0.5), rtol=1e-15, atol=0)


def test_the_mixing_matrix_has_the_dtype_asked_for_and_at_least_one_row():
    assert mixing_matrix(6, torch.float16, "cpu").dtype == torch.float16
    with pytest.raises(InputError, match="at least one row"):
        mixing_matrix(0, torch.float64, "cpu")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_product_stays(shape: tuple[int, int, int, int], weighted: bool):
    a, b, weight = make_pair(*shape)
    new_a, new_b = transformed(balanced_transform(a, b, weight if weighted else None), a, b)
    assert (new_a @ new_b - a @ b).norm() < 1e-10 * (a @ b).norm()
    assert not torch.allclose(new_b, b, rtol=0.1)


@pytest.mark.parametrize("r", [1, 2, 8, 64])
@pytest.mark.parametrize("weighted", [False, True])
def test_both_terms_meet_their_lower_bounds(r: int, weighted: bool):
    a, b, weight = make_pair(3, 2 * r + 5, r, 3 * r + 1)
    roots = weight.sqrt() if weighted else torch.ones_like(weight)
    new_a, new_b = transformed(balanced_transform(a, b, weight if weighted else None), a, b)
    bound = lower_bound(a, b * roots)
    for term in surrogate(new_a, new_b * roots):
        torch.testing.assert_close(term, bound, rtol=1e-5, atol=0)
    assert (surrogate(a, b * roots)[0] > 1.01 * bound).all() or r == 1


@pytest.mark.parametrize(("r", "excess"), [(3, 0.15), (43, 0.05), (80, 2e-3), (96, 2e-3), (112, 2e-3)])
def test_other_sizes_meet_the_first_bound_and_nearly_the_second(r: int, excess: float):
    a, b, _ = make_pair(2, 2 * r, r, 2 * r)
    first, second = surrogate(*transformed(balanced_transform(a, b), a, b))
    bound = lower_bound(a, b)
    torch.testing.assert_close(first, bound, rtol=1e-5, atol=0)
    assert (second < (1 + excess) * bound).all()
    assert (second > (1 - 1e-9) * bound).all()


def test_no_other_transformation_is_better():
    a, b, _ = make_pair(4, 40, 16, 30)
    m = balanced_transform(a, b)
    best = sum(surrogate(*transformed(m, a, b)))
    generator = torch.Generator().manual_seed(1)
    for distance in (1e-3, 1e-2, 0.1, 1.0, 10.0):
        for _ in range(20):
            noise = torch.randn(m.shape, generator=generator, dtype=m.dtype)
            other = sum(surrogate(*transformed(m + distance * noise @ m / 4, a, b)))
            assert (other > best * (1 - 1e-9)).all()


def test_all_heads_share_the_energy_alike_and_values_keep_theirs():
    a, b, weight = make_pair(3, 40, 8, 24)
    a[1] *= 100  # in the output projection, heads may share scales
    new_a, new_b = transformed(balanced_transform(a, b, weight), a, b)
    ratio = new_a.norm(dim=(1, 2)) / (new_b * weight.sqrt()).norm(dim=(1, 2))
    torch.testing.assert_close(ratio, ratio[:1].expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(new_b.norm(), b.norm())


def degenerate_pairs() -> dict[str, tuple[Tensor, Tensor]]:
    pairs = {name: make_pair(3, 40, 16, 24)[:2] for name in ("zero row", "zero column", "rank", "a", "b", "both")}
    pairs["zero row"][1][0, 3] = 0
    pairs["zero column"][0][1, :, 4:12] = 0
    pairs["rank"][0][:] = pairs["rank"][0][:, :, :2] @ torch.ones(2, 16, dtype=torch.float64)
    pairs["a"][0][1] = 0
    pairs["b"][1][1] = 0
    pairs["both"][0][1], pairs["both"][1][1] = 0, 0
    pairs["few inputs"] = make_pair(2, 40, 16, 5)[:2]
    pairs["few outputs"] = make_pair(2, 5, 16, 24)[:2]
    pairs["nothing"] = (torch.zeros(2, 9, 4, dtype=torch.float64), torch.zeros(2, 4, 7, dtype=torch.float64))
    pairs["tiny"] = (1e-25 * make_pair(2, 40, 16, 24)[0], 1e25 * make_pair(2, 40, 16, 24)[1])
    return pairs


@pytest.mark.parametrize("name", list(degenerate_pairs()))
@pytest.mark.parametrize("weighted", [False, True])
def test_degenerate_pairs_get_a_well_conditioned_matrix(name: str, weighted: bool):
    a, b = degenerate_pairs()[name]
    weight = (torch.arange(b.shape[-1]) % 2).double() if weighted else None
    m = balanced_transform(a, b, weight)
    assert m.isfinite().all()
    r = m.shape[-1]
    assert (torch.linalg.cond(m) < 1.01 * (1e6 * r + 1) ** 0.5).all()
    new_a, new_b = transformed(m, a, b)
    assert (new_a @ new_b - a @ b).norm() <= 1e-10 * (a @ b).norm()
    if weight is None and name not in ("a", "b", "both", "nothing"):
        for term in surrogate(new_a, new_b):
            assert (term < 1.02 * lower_bound(a, b)).all()


def test_a_head_that_is_not_read_does_not_widen_the_range_of_the_others():
    a, b = degenerate_pairs()["b"]
    new_a, _ = transformed(balanced_transform(a, b), a, b)
    norms = new_a.norm(dim=(1, 2))
    assert norms[1] < 0.2 * norms[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_any_dtype_give_a_float64_matrix(dtype: torch.dtype):
    a, b, weight = make_pair(2, 20, 8, 12)
    assert balanced_transform(a.to(dtype), b.to(dtype), weight.to(dtype)).dtype == torch.float64


def test_bad_pairs_are_refused():
    a, b, weight = make_pair(2, 20, 8, 12)
    for bad in ((a[0], b[0]), (a[:1], b), (a[..., :7], b), (a[:, :0], b)):
        with pytest.raises(InputError, match=r"a pair is \(heads, p, r\) and \(heads, r, n\)"):
            balanced_transform(*bad)
    with pytest.raises(InputError, match="floating"):
        balanced_transform(a.long(), b)
    with pytest.raises(InputError, match="NaN or infinite"):
        balanced_transform(a, b.clone().fill_(torch.nan))
    with pytest.raises(InputError, match="weights are of shape"):
        balanced_transform(a, b, weight[:3])
    with pytest.raises(InputError, match="not negative"):
        balanced_transform(a, b, -weight)
    with pytest.raises(InputError, match="must be positive"):
        paper_transform(a, b, temperature=0)


def largest_peaks(a: Tensor, b: Tensor, m: Tensor) -> Tensor:
    """The largest magnitude of each head's two factors, each relative to its mean before the transformation."""
    parts = zip(transformed(m, a, b), (a, b), strict=True)
    return torch.stack([new.abs().amax((1, 2)) / old.abs().amax(-1).mean(-1) for new, old in parts]).amax(0)


@pytest.mark.parametrize("balanced", [False, True])
def test_the_gradient_form_lowers_the_peaks_and_keeps_the_product(balanced: bool):
    a, b, _ = make_pair(2, 24, 8, 20)
    start = balanced_transform(a, b) if balanced else torch.eye(8, dtype=torch.float64).repeat(2, 1, 1)
    with torch.inference_mode():  # as callers do
        m = paper_transform(a.clone(), b.clone(), start=start.clone(), steps=150)
    torch.testing.assert_close(m, paper_transform(a, b, start=start, steps=150), rtol=0, atol=0)
    at_start, identity = transformed(start, a, b), torch.eye(8, dtype=torch.float64)
    assert (largest_peaks(*at_start, m @ start.inverse()) < 0.85 * largest_peaks(*at_start, identity)).all()
    new_a, new_b = transformed(m, a, b)
    assert (new_a @ new_b - a @ b).norm() < 1e-10 * (a @ b).norm()


def test_the_gradient_form_starts_where_it_is_told_to():
    a, b, _ = make_pair(2, 24, 8, 20)
    identity = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    torch.testing.assert_close(paper_transform(a, b, steps=0), identity, rtol=0, atol=0)
    start = balanced_transform(a, b)
    torch.testing.assert_close(paper_transform(a, b, start=start, steps=0), start, rtol=0, atol=0)
    near = paper_transform(a, b, start=start, steps=1, learning_rate=1e-6)
    assert 0 < (near - start).norm() < 1e-4 * start.norm()


def test_the_gradient_form_returns_the_best_on_the_way():
    a, b, _ = make_pair(2, 24, 8, 20)
    identity = torch.eye(8, dtype=torch.float64).expand(2, 8, 8)
    thrown_off = paper_transform(a, b, steps=5, learning_rate=50)
    torch.testing.assert_close(thrown_off, identity, rtol=0, atol=0)


def test_the_gradient_form_does_not_depend_on_scales_or_on_other_heads():
    a, b, _ = make_pair(2, 24, 8, 20)
    m = paper_transform(a, b, steps=20)
    torch.testing.assert_close(paper_transform(8 * a, b / 32, steps=20), m)
    a[1], b[1] = 0, 0
    with_zeros = paper_transform(a, b, steps=20)
    torch.testing.assert_close(with_zeros[0], m[0])
    assert with_zeros.isfinite().all()
