"""How the embedded model was made: `python -m trimfit.demo.train OUT`.

A Llama of 5.2 million parameters, trained from nothing on the source of the standard library, with its own
byte-level BPE tokenizer. Seeded; about 40 minutes on two CPU cores with bfloat16 instructions.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trimfit.calibration import standard_library
from trimfit.precision import in_hardware

DOCUMENT = "<|document|>"  # begins every document and every window
CONTEXT = 512
VOCABULARY = 2048
BATCH = 16
STEPS = 1250
WARMUP = 60
PEAK_LEARNING_RATE = 3e-3


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text encodes, nothing is ever unknown."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{DOCUMENT} $A", special_tokens=[(DOCUMENT, tokenizer.token_to_id(DOCUMENT))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=DOCUMENT, eos_token=DOCUMENT, model_max_length=CONTEXT
    )


def build_model(bos: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=6,
            num_attention_heads=8,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=bos,
            eos_token_id=bos,
            pad_token_id=None,
        )
    )


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine down to a twentieth."""
    if step < WARMUP:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP
    progress = (step - WARMUP) / (steps - WARMUP)
    return PEAK_LEARNING_RATE * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def batches(tokens: torch.Tensor, bos: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Windows at a random offset of each epoch, in random order; every window begins with the document token."""
    length = CONTEXT - 1
    while True:
        offset = int(torch.randint(length, (1,), generator=generator))
        count = (len(tokens) - offset) // length
        windows = tokens[offset : offset + count * length].view(count, length)
        for rows in torch.randperm(count, generator=generator).split(BATCH):
            if len(rows) == BATCH:
                yield torch.cat([torch.full((BATCH, 1), bos), windows[rows]], dim=1)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> tuple[torch.Tensor, int]:
    """All tokens of the texts in a row, and the one that begins each of them."""
    bos = tokenizer.convert_tokens_to_ids(DOCUMENT)
    assert isinstance(bos, int)
    return torch.tensor([token for ids in tokenizer(texts)["input_ids"] for token in ids]), bos


def train(model: PreTrainedModel, tokens: torch.Tensor, bos: int, seed: int, steps: int) -> None:
    """In place, in bfloat16 where that serves; says how it goes."""
    decayed = [p for p in model.parameters() if p.dim() == 2]
    free = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": free, "weight_decay": 0.0}], betas=(0.9, 0.95)
    )
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of {BATCH * CONTEXT} tokens")
    stream = batches(tokens, bos, torch.Generator().manual_seed(seed))
    start, average = time.perf_counter(), None
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        windows = next(stream)
        with torch.autocast("cpu", torch.bfloat16, enabled=in_hardware(torch.bfloat16)):
            loss = model(input_ids=windows, labels=windows).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {average:.3f}  {time.perf_counter() - start:6.0f} s", flush=True)


def main(out: Path, seed: int) -> None:
    torch.manual_seed(seed)
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in standard_library.training_files()]
    tokenizer = train_tokenizer(texts)
    tokens, bos = encode(tokenizer, texts)
    print(
        f"{standard_library.describe()}: {len(texts)} files, {sum(map(len, texts)):,} characters, "
        f"{len(tokens):,} tokens"
    )
    model = build_model(bos)
    train(model, tokens, bos, seed, STEPS)

    out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    main(arguments.out, arguments.seed)
