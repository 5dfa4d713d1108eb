"""Trains a small model to measure on, that no choice of ours was made on: of Qwen3's architecture, in minutes on a CPU.

    python benchmarks/train_model.py OUT

Its text is the docstrings of installed packages (`PACKAGES`), so with the versions of constraints.txt everybody has the
same. OUT gets the model in bfloat16 (`OUT/model`) and two texts that it has not seen: `OUT/calibration.txt` and
`OUT/evaluation.txt`, of other modules.
"""

import argparse
import ast
import hashlib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from trimfit.demo.train import CONTEXT, VOCABULARY, encode, train, train_tokenizer

PACKAGES = ("numpy", "torch", "transformers", "scipy")
SHORTEST = 200  # characters of a docstring
TEXT = 600_000  # characters of each text that is kept for measuring


def main() -> None:
    options = argparse.ArgumentParser(description="Train a model to measure on.")
    options.add_argument("out", type=Path)
    options.add_argument("--steps", type=int, default=600)
    arguments = options.parse_args()
    torch.manual_seed(0)
    parts = split_by_module()
    arguments.out.mkdir(parents=True)
    for name in ("calibration", "evaluation"):
        (arguments.out / f"{name}.txt").write_text("\n\n".join(parts[name])[:TEXT], encoding="utf-8")
    texts = parts["training"]
    tokenizer = train_tokenizer(texts[::8])
    tokens, bos = encode(tokenizer, texts)
    print(f"{len(texts):,} docstrings, {sum(map(len, texts)):,} characters, {len(tokens):,} tokens", flush=True)
    model = build_model(bos)
    train(model, tokens, bos, 0, arguments.steps)
    model.bfloat16().save_pretrained(arguments.out / "model")
    tokenizer.save_pretrained(arguments.out / "model")


def split_by_module() -> dict[str, list[str]]:
    """Docstrings, each once: two modules of twenty are kept for measuring."""
    parts: dict[str, list[str]] = {"training": [], "calibration": [], "evaluation": []}
    seen: set[str] = set()
    for package in PACKAGES:
        found = find_spec(package)
        assert found is not None and found.origin is not None
        root = Path(found.origin).parent
        for path in sorted(root.rglob("*.py")):
            number = hashlib.sha256(str(path.relative_to(root.parent)).encode()).digest()[0] % 20
            part = {0: "calibration", 1: "evaluation"}.get(number, "training")
            for text in docstrings(path):
                if text not in seen:
                    seen.add(text)
                    parts[part].append(text)
    return parts


def docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError:  # a file for later versions of Python
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node) or ""
            if len(text) >= SHORTEST:
                yield text


def build_model(bos: int) -> Qwen3ForCausalLM:
    """Unlike the embedded model it has norms of Q and K, four query heads for each KV head, and an output layer."""
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=False,
            bos_token_id=bos,
            eos_token_id=bos,
        )
    )


if __name__ == "__main__":
    main()
