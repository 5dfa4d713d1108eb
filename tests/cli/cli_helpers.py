"""The real command, and a tiny model with its tokenizer and texts."""

import json
import os
import random
import subprocess
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

COMMAND = Path(sysconfig.get_path("scripts")) / "trimfit"
VOCABULARY = 300
CONTEXT = 64
NEW_TOKENS = 7  # in the generation config, to be found again
FILES = {  # of every checkpoint that a command writes
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trimfit.json",
}
SENTENCE = "the cat sat on a mat and saw one dog under two trees while three birds sang of über große Straßen"


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit status and what it wrote."""

    status: int
    stdout: str
    stderr: str


def environment(**extra: str) -> dict[str, str]:
    """Of the command: one thread, no network, nothing that changes how it prints."""
    changed = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"}
    kept = {name: value for name, value in os.environ.items() if name not in changed}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TERM": "xterm", **extra}


def trimfit(*arguments: str | Path, **extra: str) -> Outcome:
    """Runs the installed command; `extra` is for its environment."""
    done = subprocess.run([COMMAND, *arguments], capture_output=True, text=True, env=environment(**extra), timeout=300)
    return Outcome(done.returncode, done.stdout, done.stderr)


def write_text(path: Path, words: int) -> Path:
    """Some five tokens for each word, always the same."""
    drawn = random.Random(0).choices(SENTENCE.split(), k=words)
    path.write_text("\n".join(" ".join(drawn[i : i + 12]) for i in range(0, words, 12)), encoding="utf-8")
    return path


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that begins each text with <s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([SENTENCE] * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def make_model(vocabulary: int = VOCABULARY, intermediate: int = 48, hidden: int = 32) -> LlamaForCausalLM:
    """Two blocks of random bfloat16 weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=1, max_new_tokens=NEW_TOKENS)
    return model


def save_model(directory: Path, model: PreTrainedModel | None = None, shard_size: str = "50GB") -> Path:
    """Writes the tiny model, or the one given, with the tokenizer."""
    (model or make_model()).save_pretrained(directory, max_shard_size=shard_size)
    make_tokenizer().save_pretrained(directory)
    return directory


def nothing_but(directory: Path, names: Iterable[str] = ()) -> bool:
    """Whether the directory holds just these: hidden files count too."""
    return sorted(path.name for path in directory.iterdir()) == sorted(names)


def is_one_sentence(outcome: Outcome) -> bool:
    """Whether the command said what was wrong in one line, and nothing else."""
    lines = outcome.stderr.splitlines()
    return len(lines) == 1 and lines[0].startswith("error: ") and "Traceback" not in outcome.stderr


def read_json(text: str) -> dict[str, Any]:
    """Strictly: json lets NaN and Infinity through."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def read_record(directory: Path) -> dict[str, Any]:
    """What a command tells of its run beside the checkpoint."""
    return read_json((directory / "trimfit.json").read_text(encoding="utf-8"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in one file."""
    return load_file(directory / "model.safetensors")
