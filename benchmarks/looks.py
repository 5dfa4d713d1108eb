"""What it costs in steps that the host reads late, or seldom, how many rows of a refit go on.

    python benchmarks/capture_grams.py demo GRAMS.safetensors --blocks 0 3 5 --samples 32 --sequence-length 256
    python benchmarks/looks.py GRAMS.safetensors

Half of the weights of each row kept by Wanda's score, refitted to a gap of 1e-3. Prints a Markdown table: steps of a
row on the average, with those in which it was still in the batch although it had been finished.
"""

import argparse
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor

from trimfit import ConjugateGradients, FactoredGram, refit
from trimfit.refit import conjugate_gradients, iteration

WAYS = {  # steps between two looks, and whether what is seen is that of the look before
    "every step, at once": (1, False),
    "every step, one late": (1, True),
    "every second, one late": (2, True),
    "every fourth, one late": (4, True),
}


class Late:
    """As on a GPU."""

    def __init__(self, device: torch.device):
        self._seen: Tensor | None = None

    def take(self, unfinished: Tensor) -> tuple[Tensor, int]:
        seen, self._seen = self._seen, unfinished
        return (unfinished, len(unfinished)) if seen is None else (seen, int(seen.sum()))


class Counting(conjugate_gradients._Rows):
    """Rows that have taken a step."""

    rows_multiplied = 0

    def multiply(self, point: Tensor) -> Tensor:
        Counting.rows_multiplied += len(point)
        return super().multiply(point)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grams", type=Path)
    tensors = load_file(parser.parse_args().grams)
    print(f"| layer | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
    totals = dict.fromkeys(WAYS, 0.0)
    for name in (key.removesuffix(".weight") for key in tensors if key.endswith(".weight")):
        gram = FactoredGram(tensors[f"{name}.gram"].double(), 0.01)
        weight = tensors[f"{name}.weight"].float()
        score = weight.abs() * gram.raw.diagonal().sqrt().float()
        mask = score >= score.median(1, keepdim=True).values
        cells: list[str] = []
        for way, (every, late) in WAYS.items():
            with _looking(every, late):
                refit(gram, weight, mask, solver=ConjugateGradients(tolerance=1e-3))
            steps = Counting.rows_multiplied / len(weight)
            totals[way] += steps
            cells.append(f"{steps:.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
    first = totals[next(iter(WAYS))]
    print(f"| all, as a share of the first | {' | '.join(f'{total / first:.2f}' for total in totals.values())} |")


@contextmanager
def _looking(every: int, late: bool) -> Generator[None]:
    Counting.rows_multiplied = 0
    with (
        mock.patch.object(iteration, "_Looks", Late if late else iteration._Looks),
        mock.patch.object(conjugate_gradients, "_Rows", Counting),
        mock.patch.dict(conjugate_gradients._CHECK_EVERY, masked_inverse=every),
    ):
        yield


if __name__ == "__main__":
    main()
