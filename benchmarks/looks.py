"""What it costs in steps that the host reads late, or seldom, how many rows of a refit go on.

    python benchmarks/capture_grams.py demo GRAMS.safetensors --blocks 0 3 5 --samples 32 --sequence-length 256
    python benchmarks/looks.py GRAMS.safetensors

Half of the weights of each row kept by Wanda's score, refitted to --tolerance. Prints a Markdown table: steps of a
row on the average, with those in which it was still in the batch although it had been finished.
"""

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

from safetensors.torch import load_file
from torch import Tensor

from trimfit import ConjugateGradients, FactoredGram, refit
from trimfit.refit import conjugate_gradients, iteration

WAYS = {  # steps between two looks, and how what is found at a look is used
    "every step, at once": (1, "at once"),
    "every second, at once": (2, "at once"),
    "every step, a look late": (1, "late"),
    "every second, a look late": (2, "late"),
    "every fourth, a look late": (4, "late"),
    "every step, foreseen a look before": (1, "foreseen"),
    "every second, foreseen a look before": (2, "foreseen"),
}


class Late:
    """What was found at the look before, and acted upon at once."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def expected(self, bound: Tensor, enough: Tensor) -> int:
        unfinished = bound > enough
        seen, self._seen = self._seen, unfinished
        return len(bound) if seen is None else int(seen.sum())

    def rows(self, index: Tensor) -> "Late":
        return Late()


class Counting(conjugate_gradients._Rows):
    """Rows that have taken a step."""

    rows_multiplied = 0

    def multiply(self, point: Tensor) -> Tensor:
        Counting.rows_multiplied += len(point)
        return super().multiply(point)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grams", type=Path)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    arguments = parser.parse_args()
    tensors = load_file(arguments.grams)
    print(f"| layer | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    totals = dict.fromkeys(WAYS, 0.0)
    for name in (key.removesuffix(".weight") for key in tensors if key.endswith(".weight")):
        gram = FactoredGram(tensors[f"{name}.gram"].double(), 0.01)
        weight = tensors[f"{name}.weight"].float()
        score = weight.abs() * gram.raw.diagonal().sqrt().float()
        mask = score >= score.median(1, keepdim=True).values
        cells: list[str] = []
        for way, (every, how) in WAYS.items():
            with _looking(every, how):
                refit(gram, weight, mask, solver=ConjugateGradients(tolerance=arguments.tolerance))
            steps = Counting.rows_multiplied / len(weight)
            totals[way] += steps
            cells.append(f"{steps:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    first = totals[next(iter(WAYS))]
    print(f"| all, as a share of the first | {' | '.join(f'{total / first:.2f}' for total in totals.values())} |")


@contextmanager
def _looking(every: int, how: str) -> Generator[None]:
    Counting.rows_multiplied = 0
    looks = iteration._Looks
    with (
        mock.patch.object(iteration, "_Looks", lambda late: Late() if how == "late" else looks(late=how == "foreseen")),
        mock.patch.object(conjugate_gradients, "_Rows", Counting),
        mock.patch.dict(conjugate_gradients._CHECK_EVERY, masked_inverse=every),
    ):
        yield


if __name__ == "__main__":
    main()
