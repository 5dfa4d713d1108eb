"""What faster products inside conjugate gradients cost in steps, by rounding their factors as a GPU would.

    python benchmarks/capture_grams.py demo GRAMS.safetensors --blocks 0 3 5 --samples 32 --sequence-length 256
    python benchmarks/arithmetic.py GRAMS.safetensors

The first rows of each layer, half of their weights kept by Wanda's score. Residuals and certificates outside the solver
are float64 throughout. Prints a Markdown table: steps, and how a refit ended where it was not optimal.
"""

import argparse
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from trimfit import ConjugateGradients, FactoredGram, Status, refit
from trimfit.precision import split

Product = Callable[[Tensor, Tensor], Tensor]
plain: Product = torch.Tensor.__matmul__


def tf32(a: Tensor, b: Tensor) -> Tensor:
    """10 bits of mantissa."""
    return plain(_round(a), _round(b))


def bfloat16(a: Tensor, b: Tensor) -> Tensor:
    return plain(a.bfloat16().float(), b.bfloat16().float())


def three_tf32(a: Tensor, b: Tensor) -> Tensor:
    """As `trimfit.precision.Factor` on a GPU."""
    (a1, a2), (b1, b2) = split(a), split(b)
    return plain(_round(a2), b1) + plain(a1, _round(b2)) + plain(a1, b1)


def three_bfloat16(a: Tensor, b: Tensor) -> Tensor:
    """Each factor as the sum of two bfloat16 numbers; the product of the small ones is left out."""
    (a1, a2), (b1, b2) = _halves(a), _halves(b)
    return plain(a1, b1) + plain(a1, b2) + plain(a2, b1)


PRODUCTS: dict[str, Product] = {
    "float32": plain,
    "3 × TF32": three_tf32,
    "3 × bfloat16": three_bfloat16,
    "TF32": tf32,
    "bfloat16": bfloat16,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grams", type=Path)
    parser.add_argument("--rows", type=int, default=128)
    arguments = parser.parse_args()
    tensors = load_file(arguments.grams)
    print(f"| layer | inputs | ‖A⁻¹‖ | {' | '.join(PRODUCTS)} |\n|---|---|---|{'---|' * len(PRODUCTS)}")
    for name in (key.removesuffix(".weight") for key in tensors if key.endswith(".weight")):
        gram = FactoredGram(tensors[f"{name}.gram"].double())
        weight = tensors[f"{name}.weight"].float()[: arguments.rows]
        score = weight.abs() * gram.raw.diagonal().sqrt().float()
        mask = score >= score.median(1, keepdim=True).values
        cells = [_cell(gram, weight, mask, product) for product in PRODUCTS.values()]
        print(f"| {name} | {gram.size} | {gram.certifiable.inverse_norm:.0f} | {' | '.join(cells)} |", flush=True)


def _cell(gram: FactoredGram, weight: Tensor, mask: Tensor, product: Product) -> str:
    with _multiplying(product):
        solution = refit(gram, weight, mask, solver=ConjugateGradients())
    return str(solution.steps) if solution.status is Status.OPTIMAL else f"{solution.steps}: {solution.status.value}"


@contextmanager
def _multiplying(product: Product) -> Generator[None]:
    """With products of float32 matrices as given."""
    torch.Tensor.__matmul__ = lambda a, b: product(a, b) if a.dtype == torch.float32 else plain(a, b)
    try:
        yield
    finally:
        torch.Tensor.__matmul__ = plain


def _round(a: Tensor) -> Tensor:
    bits = a.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _halves(a: Tensor) -> tuple[Tensor, Tensor]:
    high = a.bfloat16().float()
    return high, (a - high).bfloat16().float()


if __name__ == "__main__":
    main()
