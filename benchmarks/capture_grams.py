"""Writes Gram matrices and weights of a model's layers to a file for benchmarks/refit.py.

python benchmarks/capture_grams.py demo OUT.safetensors --blocks 0 5
"""

import argparse
from pathlib import Path

import torch
from common import quiet
from safetensors.torch import save_file

import trimfit
from trimfit.demo.run import model_path
from trimfit.models import Walker, find_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=[0])
    parser.add_argument("--every-layer", action="store_true", help="not only the first of those that share a matrix")
    parser.add_argument("--calibration", default="demo")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--sequence-length", type=int, default=512)
    arguments = parser.parse_args()

    quiet()
    checkpoint = trimfit.load_checkpoint(str(model_path()) if arguments.model == "demo" else arguments.model)
    calibration = trimfit.CalibrationConfig(
        source=arguments.calibration, samples=arguments.samples, sequence_length=arguments.sequence_length
    )
    windows = calibration.windows(checkpoint.tokenizer, checkpoint.model)
    walker = Walker(checkpoint.model, find_blocks(checkpoint.model), {"all": windows})
    tensors: dict[str, torch.Tensor] = {}
    for block in walker:
        if block.index not in arguments.blocks:
            continue
        groups = walker.groups(block)
        for group, gram in zip(groups, walker.grams(block, groups, "all"), strict=True):
            for layer in group.layers if arguments.every_layer else group.layers[:1]:
                name = f"block {block.index} {layer.name.rsplit('.', 1)[-1]}"
                tensors |= {f"{name}.gram": gram.clone(), f"{name}.weight": layer.weight.float().contiguous()}
    save_file(tensors, arguments.out)


if __name__ == "__main__":
    main()
