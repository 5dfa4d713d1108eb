"""Excess nats of pruning with a sparsity that is uniform, allocated by outliers (OWL), or by estimated error.

    python benchmarks/allocation_table.py demo --calibration demo --text demo --characters 4000
    python benchmarks/allocation_table.py MODEL --calibration FILE --text FILE --skip 0.85

Each cell prunes the dense model anew and refits it. Prints a Markdown table: excess nats per token over the dense
model, mean over the seeds, which choose the calibration windows; below it each seed's difference to uniform.
"""

import argparse
import itertools
import statistics

from common import documents, machine, quiet

import trimfit
from trimfit.calibration import CalibrationConfig
from trimfit.demo.run import model_path
from trimfit.evaluate import score_text

METHODS = ("uniform", "owl", "error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--skip", type=float, default=0.0, help="share of the text's documents to skip")
    parser.add_argument("--characters", type=int, help="of each document to score, from its middle")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--selectors", nargs="*", default=["wanda", "sparsegpt"])
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.5, 0.6, 0.7])
    arguments = parser.parse_args()

    quiet()
    source = str(model_path()) if arguments.model == "demo" else arguments.model
    checkpoint = trimfit.load_checkpoint(source)
    model, tokenizer = checkpoint.model, checkpoint.tokenizer
    texts = documents(arguments.text, arguments.characters, arguments.skip)
    length = arguments.sequence_length
    dense_state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = score_text(model, tokenizer, texts, length=length)
    excess: dict[tuple[str, float, str], list[float]] = {}
    cells = itertools.product(arguments.selectors, arguments.sparsities, range(arguments.seeds), METHODS)
    for selector, sparsity, seed, method in cells:
        calibration = CalibrationConfig(
            source=arguments.calibration, samples=arguments.samples, sequence_length=length, seed=seed
        )
        model.load_state_dict(dense_state)
        options = {"selector": selector, "sparsity": sparsity, "allocation": method, "target": "layer", "guard": False}
        config = trimfit.PruneConfig.model_validate(options)
        trimfit.prune(model, calibration.windows(tokenizer, model), config)
        nats = score_text(model, tokenizer, texts, length=length).nats - dense.nats
        excess.setdefault((selector, sparsity, method), []).append(nats)
        print(selector, sparsity, seed, method, f"{nats:.4f}", flush=True)

    print(f"\n{machine()}\n\n{dense.tokens:,} tokens scored, dense {dense.nats:.4f} nats; {arguments.seeds} seeds.\n")
    print("| mask | sparsity | " + " | ".join(METHODS) + " | owl − uniform | error − uniform |")
    print("|---|---|" + "---|" * (len(METHODS) + 2))
    for selector, sparsity in itertools.product(arguments.selectors, arguments.sparsities):
        columns = [excess[selector, sparsity, method] for method in METHODS]
        means = [f"{statistics.mean(values):.4f}" for values in columns]
        gains = [", ".join(f"{b - a:+.4f}" for a, b in zip(columns[0], c, strict=True)) for c in columns[1:]]
        print(f"| {selector} | {sparsity:.0%} | " + " | ".join(means + gains) + " |")


if __name__ == "__main__":
    main()
