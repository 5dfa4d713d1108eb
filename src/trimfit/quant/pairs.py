"""Transformations of a pair A·B that leave the product as it is and make both factors easier to round.

A (heads, p, r) are the columns of the output projection that read one KV head, with the g query heads of a group
stacked (p = g·d); B (heads, r, n) are the rows of the value projection that make it. For any invertible M (r, r),
A M⁻¹ · M B is the same product, and the rounding errors are others.
"""

import torch
from torch import Tensor

from trimfit.errors import InputError
from trimfit.quant.hadamard import mixing_matrix
from trimfit.refit.gram import widest

_FLOOR = 1e-6  # energy that every direction is taken to have at least, of the mean: less is lost in 16-bit weights


def balanced_transform(a: Tensor, b: Tensor, input_weight: Tensor | None = None) -> Tensor:
    """M (heads, r, r) in the widest dtype of the device: balanced SVD of the product, then mixing.

    If rounding errors go with the energy of the row they are made in, the product's error is, up to a constant,

        ‖A M⁻¹‖² ‖M B̃‖² / r  +  Σ_i ‖(A M⁻¹)_{:,i}‖² ‖(M B̃)_{i,:}‖²,     B̃ = B diag(c)^{1/2}

    and neither term can be below ‖A B̃‖_*² / r (nuclear norm). With A B̃ = U S Vᵀ both bounds are met at once by
    A M⁻¹ = U S^{1/2} Q and M B̃ = Qᵀ S^{1/2} Vᵀ with Q orthogonal and such that the diagonal of Qᵀ S Q is constant:
    Hadamard's matrix for r a power of two. For other r, `mixing_matrix` meets the first bound, and the second nearly.

    Directions that A or B hardly has (pruned heads, zero rows, r > n) are treated as if they had a millionth of the
    mean energy, so the condition number of M is never above √(10⁶·r + 1). Heads of a layer are scaled against each
    other as the optimum wants it, and all together so that M B has the energy of B.

    **Arguments**

    - `a`: (heads, p, r) floating.
    - `b`: (heads, r, n) floating.
    - `input_weight`: c (n,) ≥ 0, mean squares of the inputs of B; 1 where None.

    Raises `InputError` for shapes that do not fit and for entries that are not finite.
    """
    check_pair(a, b)
    work = widest(b.device)
    a, b = a.detach().to(work), b.detach().to(work)
    weighted = b if input_weight is None else b * _roots(input_weight, b)
    energy_a, energy_b = a.square().sum((1, 2)), weighted.square().sum((1, 2))
    # A factor that is all zeros is taken to be as large as its partner.
    floor_a = torch.where(energy_a > 0, energy_a, energy_b)
    floor_b = torch.where(energy_b > 0, energy_b, energy_a)
    factor_a, factor_b = _triangular(a, floor_a), _triangular(weighted.mT, floor_b)
    left, singular, _ = torch.linalg.svd(factor_a @ factor_b.mT)
    mixed = left * singular.rsqrt()[:, None, :] @ mixing_matrix(a.shape[-1], work, a.device)
    m = mixed.mT @ factor_a
    before, after = b.square().sum(), (m @ b).square().sum()
    return m * (before / after).sqrt() if before > 0 else m


def paper_transform(
    a: Tensor,
    b: Tensor,
    *,
    start: Tensor | None = None,
    steps: int = 3000,
    learning_rate: float = 1e-2,
    temperature: float = 5.0,
) -> Tensor:
    """M (heads, r, r) in the widest dtype of the device, learned by gradient descent on the largest magnitudes.

    What is known of CafeQ's transformation (arXiv 2511.19705, sec. 4.2): M is invertible and not orthogonal; Adam with
    learning rates from 1e-3 to 1e-2 and up to 100 000 steps; the loss is a LogSumExp, as a smooth maximum, over the
    largest magnitudes of the channels of both transformed matrices; the temperature matters little.

    Ours, because it is not known: channels are the rows of A M⁻¹ and of M B, those that share a scale; magnitudes are
    relative to the mean over the channels of the same factor at the start, so neither temperature nor learning rate
    depends on the scale of the weights; M starts from the identity; the M of the least loss on the way is returned.
    Nothing is random.

    **Arguments**

    - `a`, `b`: (heads, p, r) and (heads, r, n) floating; computed in float32, or float64 if they are that.
    - `start`: (heads, r, r) the M to start from, the identity where None. What is learned is the change of basis from
      there on, so that steps mean the same wherever they start. `balanced_transform` saves most of the steps.
    - `temperature`: t > 0 in log Σ exp(t·magnitude) / t: the larger, the nearer to the maximum.

    Raises `InputError` for shapes that do not fit, entries that are not finite and numbers that are not positive.
    """
    check_pair(a, b)
    if steps < 0 or learning_rate <= 0 or temperature <= 0:
        raise InputError("steps must not be negative; learning rate and temperature must be positive")
    heads, _, r = a.shape
    wide, work = widest(b.device), torch.float64 if a.dtype == torch.float64 else torch.float32
    identity = torch.eye(r, dtype=wide, device=b.device).repeat(heads, 1, 1)
    start = identity if start is None else start.to(wide)
    # Callers that compress models have gradients switched off, perhaps by inference mode.
    with torch.inference_mode(False), torch.enable_grad():
        a = _relative(torch.linalg.solve(start, a.detach().to(wide), left=False)).to(work)
        b = _relative(start @ b.detach().to(wide)).to(work)
        m = identity.to(work, copy=True).requires_grad_()
        optimizer = torch.optim.Adam([m], lr=learning_rate)
        best, least = m.detach().clone(), torch.full((heads,), torch.inf, device=a.device)
        for step in range(steps + 1):
            undone, _ = torch.linalg.solve_ex(m, a, left=False)
            peaks = torch.cat([undone.abs().amax(-1), (m @ b).abs().amax(-1)], dim=-1)
            loss = (temperature * peaks).logsumexp(-1) / temperature
            better = loss.detach() < least  # never for NaN
            least = torch.where(better, loss.detach(), least)
            best = torch.where(better[:, None, None], m.detach(), best)
            if step < steps:
                optimizer.zero_grad()
                loss.sum().backward()
                optimizer.step()
    return best.to(wide) @ start


def check_pair(a: Tensor, b: Tensor) -> None:
    """Raises `InputError` unless A is (heads, p, r), B is (heads, r, n), and both are floating and finite."""
    if a.dim() != 3 or b.dim() != 3 or len(a) != len(b) or a.shape[-1] != b.shape[1] or 0 in (*a.shape, *b.shape):
        raise InputError(
            f"a pair is (heads, p, r) and (heads, r, n), but these are of {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if not (a.is_floating_point() and b.is_floating_point()):
        raise InputError(f"both factors must have a floating dtype, but they have {a.dtype} and {b.dtype}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise InputError("the pair has NaN or infinite entries: the model is damaged")


def _roots(input_weight: Tensor, b: Tensor) -> Tensor:
    if input_weight.shape != b.shape[-1:]:
        raise InputError(f"there are {b.shape[-1]} inputs, but their weights are of shape {tuple(input_weight.shape)}")
    if not (input_weight.isfinite() & (input_weight >= 0)).all():
        raise InputError("the weights of the inputs must be finite and not negative")
    return input_weight.to(b).sqrt()


def _triangular(factor: Tensor, energy: Tensor) -> Tensor:
    """R (heads, r, r) with RᵀR = FᵀF + the floor·I, for F (heads, rows, r) of total `energy` (heads,)."""
    r = factor.shape[-1]
    floor = torch.where(energy > 0, _FLOOR * energy / r, 1.0).sqrt()
    identity = torch.eye(r, dtype=factor.dtype, device=factor.device)
    # Rows below F, and not a sum with FᵀF, which would square the condition number.
    return torch.linalg.qr(torch.cat([factor, floor[:, None, None] * identity], dim=1), mode="r").R


def _relative(factor: Tensor) -> Tensor:
    """The factor over the mean of its rows' largest magnitudes, for each head; zeros stay zeros."""
    mean = factor.abs().amax(-1).mean(-1)[:, None, None]
    return factor / torch.where(mean > 0, mean, 1.0)
