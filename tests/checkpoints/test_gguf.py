"""GGUF files: what transformers reads from them is what was written, bit for bit, and all else is refused."""

import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers.pre_tokenizers as splitters
import torch
from families import FAMILIES, VARIANTS, make_word_tokenizer
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, processors, trainers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from trimfit.checkpoints import gguf as ours
from trimfit.checkpoints.gguf import check_gguf, write_gguf
from trimfit.checkpoints.gguf_tokenizer import tokenizer_metadata
from trimfit.errors import InputError
from trimfit.quant.grid import Grid, Quantized

ROWS = 400  # of the embeddings: more than there are tokens
SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 192, "vocab_size": ROWS}
FOUR = Grid(4, 32, symmetric=True)
FILE = "model.gguf"
CORPUS = """the weather and the words, then the other words bathe there;
breathe and gather all that is there, so they were. """
TEXTS = [
    "the words and the weights",
    "  two  spaces, a tab\t, lines\r\n\n \n  and what is there at the end  ",
    "They've 12345 ways; we'LL see (3.14e+10)...\n\n",
    "ünïcode, 日本語, 🎉 and é",
    " ",
    "a",
    "",
]


def llama(**options: Any) -> PreTrainedModel:
    return FAMILIES["llama"].build(**(SIZES | options))


def linear_layers(model: PreTrainedModel) -> list[str]:
    """All but the output embedding, as the pipelines quantize."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]


def grids_of(model: PreTrainedModel, grid: Grid = FOUR) -> dict[str, Grid]:
    return dict.fromkeys(linear_layers(model), grid)


def random_quantized(grid: Grid, out: int, width: int, dtype: torch.dtype, seed: int) -> Quantized:
    generator = torch.Generator().manual_seed(seed)
    groups = width // (grid.group_size or width)
    codes = torch.randint(0, 2**grid.bits, (out, width), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(out, groups, generator=generator) + 0.1).div(2**grid.bits).half().to(dtype)
    return Quantized(codes, scale, torch.full_like(scale, grid.middle, dtype=torch.uint8), grid)


def quantize(model: PreTrainedModel, grids: Mapping[str, Grid]) -> tuple[dict[str, Quantized], PreTrainedModel]:
    """Random codes for each layer, and the model in float32 that has those weights."""
    dense = type(model)(model.config).float().eval()
    dense.load_state_dict(model.state_dict())
    done: dict[str, Quantized] = {}
    for seed, (name, grid) in enumerate(grids.items()):
        weight = model.get_submodule(name).get_parameter("weight")
        done[name] = random_quantized(grid, *weight.shape, dtype=weight.dtype, seed=seed)
        with torch.no_grad():
            exact = replace(done[name], scale=done[name].scale.float())
            dense.get_submodule(name).get_parameter("weight").copy_(exact.dequantize())
    return done, dense


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_level()


Write = Callable[..., PreTrainedModel]


@pytest.fixture
def write(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Write:
    """Writes a model with random codes, and gives the dense model that has the same weights."""

    def make(model: PreTrainedModel, grids: Mapping[str, Grid]) -> PreTrainedModel:
        done, dense = quantize(model, grids)
        write_gguf(model, tokenizer, grids, done.items(), tmp_path / FILE)
        return dense

    return make


def load(directory: Path) -> PreTrainedModel:
    loaded, info = AutoModelForCausalLM.from_pretrained(directory, gguf_file=FILE, output_loading_info=True)
    assert not any(info.values()), info
    return loaded.eval()


def logits(model: PreTrainedModel) -> Tensor:
    tokens = torch.randint(0, ROWS, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(tokens).logits


def assert_reads_back(dense: PreTrainedModel, directory: Path) -> PreTrainedModel:
    loaded = load(directory)
    weights, expected = loaded.state_dict(), dense.state_dict()
    assert weights.keys() == expected.keys()
    for name, tensor in weights.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, expected[name]), name
    assert torch.equal(logits(loaded), logits(dense))
    return loaded


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("group", [32, 64, None])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_written_is_read_bit_for_bit(tmp_path: Path, write: Write, bits: int, group: int | None, tied: bool):
    model = llama(tie_word_embeddings=tied)
    dense = write(model, grids_of(model, Grid(bits, group, symmetric=True)))
    loaded = assert_reads_back(dense, tmp_path)
    assert loaded.config.tie_word_embeddings == tied
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}
    assert ("output.weight" in kinds) != tied
    assert {kinds[f"blk.1.{name}.weight"] for name in ("attn_q", "attn_k", "ffn_down")} == {f"Q{bits}_0"}
    assert kinds["blk.0.attn_norm.weight"] == kinds["token_embd.weight"] == "F32"


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(4, 4, 16), (8, 2, 8), (2, 1, 32), (4, 1, 24), (4, 2, 32)])
def test_heads_of_every_number_and_size(tmp_path: Path, write: Write, heads: int, kv_heads: int, head_dim: int):
    model = llama(num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim)
    assert_reads_back(write(model, grids_of(model)), tmp_path)


@pytest.mark.parametrize("wrong", ["as it is", "heads of q for k"])
def test_a_wrong_order_of_rows_would_be_seen(tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch, wrong: str):
    def order(model: PreTrainedModel, name: str, rows: int) -> Tensor | None:
        if wrong == "as it is" or not (".q_proj." in name or ".k_proj." in name):
            return None
        return torch.arange(rows).view(4, 2, -1).swapaxes(1, 2).flatten()

    monkeypatch.setattr(ours, "_row_order", order)
    dense = write(model := llama(), grids_of(model))
    assert not torch.equal(logits(load(tmp_path)), logits(dense))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 64}),  # all that the context holds
        ("qwen2", {}),
        ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 4}),
        ("qwen3", {"head_dim": 128}),
    ],
)
def test_other_families(tmp_path: Path, write: Write, family: str, options: dict[str, Any]):
    """Mistral is read as the Llama that it then is; Qwen has biases, or norms, and its rows stay in order."""
    model = FAMILIES[family].build(**(SIZES | options))
    loaded = assert_reads_back(write(model, grids_of(model)), tmp_path)
    assert loaded.config.model_type == family.replace("mistral", "llama")


@pytest.mark.parametrize("name", ["mistral", "models/mistral", ""])
def test_no_name_is_taken_for_a_type(tmp_path: Path, write: Write, name: str):
    model = llama()
    model.config.name_or_path = name
    assert_reads_back(write(model, grids_of(model)), tmp_path)


@pytest.mark.parametrize(("dtype", "kind"), [(torch.bfloat16, "BF16"), (torch.float16, "F16")])
def test_other_weights_keep_their_dtype(tmp_path: Path, write: Write, dtype: torch.dtype, kind: str):
    """And levels are what float32 makes of scales in 16 bits."""
    model = llama(dtype=dtype)
    names = [name for name in linear_layers(model) if "mlp" in name]  # q and k are reordered as they are, too
    assert_reads_back(write(model, dict.fromkeys(names, FOUR)), tmp_path)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / FILE).tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.attn_q.weight"] == kind
    assert kinds["output_norm.weight"] == kinds["blk.0.ffn_norm.weight"] == "F32"
    assert kinds["blk.0.ffn_up.weight"] == "Q4_0"


def test_several_grids_in_one_file(tmp_path: Path, write: Write):
    model = llama()
    kinds = [FOUR, Grid(8, 64, symmetric=True), Grid(4, None, symmetric=True)]
    grids = {name: kinds[i % 3] for i, name in enumerate([*linear_layers(model), "lm_head"])}
    assert_reads_back(write(model, grids), tmp_path)
    reader = gguf.GGUFReader(tmp_path / FILE)
    assert reader.get_field("general.file_type").contents() == gguf.LlamaFileType.MOSTLY_Q4_0
    assert {tensor.tensor_type.name for tensor in reader.tensors} == {"Q4_0", "Q8_0", "F32"}


def test_the_config_is_read_back(tmp_path: Path, write: Write):
    rope = {"rope_type": "default", "rope_theta": 500000.0}
    model = llama(rms_norm_eps=2**-16, rope_parameters=rope, max_position_embeddings=96)
    write(model, grids_of(model))
    config = load(tmp_path).config.to_dict()
    different = {key for key, value in model.config.to_dict().items() if config[key] != value}
    assert different <= {"_name_or_path", "dtype", "architectures", "bos_token_id", "eos_token_id", "pad_token_id"}
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)  # those of the tokenizer


def test_layers_may_come_in_any_order_and_are_not_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    model = llama()
    grids = grids_of(model)
    done, _ = quantize(model, grids)
    write_gguf(model, tokenizer, grids, done.items(), tmp_path / "in order")
    write_gguf(model, tokenizer, grids, reversed(done.items()), tmp_path / "reversed")
    assert (tmp_path / "in order").read_bytes() == (tmp_path / "reversed").read_bytes()
    sizes: list[int] = []

    def one_by_one() -> Any:
        for name, layer in done.items():
            sizes.append((tmp_path / "streamed").stat().st_size)
            yield name, layer

    write_gguf(model, tokenizer, grids, one_by_one(), tmp_path / "streamed")
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "in order").read_bytes()
    assert len(set(sizes)) > 2  # much was on disk before the last one was asked for


def test_layers_that_are_not_those_of_the_grids(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    model = llama()
    grids = grids_of(model)
    done, _ = quantize(model, grids)
    name = linear_layers(model)[3]

    def message(layers: Mapping[str, Quantized]) -> str:
        with pytest.raises(ValueError) as error:
            write_gguf(model, tokenizer, grids, layers.items(), tmp_path / FILE)
        return str(error.value)

    assert message({k: v for k, v in done.items() if k != name}) == f"{name} has a grid but did not come"
    assert message(done | {"lm_head": done[name]}) == "lm_head came but has no grid, or came twice"
    assert message(done | {name: replace(done[name], grid=Grid(8, 32, True))}).startswith(f"{name} came as (64, 64) on")
    assert message(done | {name: done["model.layers.0.mlp.up_proj"]}).startswith(f"{name} came as (192, 64) on")


# What cannot be held


def refusal(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, grids: Mapping[str, Grid] | None = None) -> str:
    with pytest.raises(InputError) as error:
        check_gguf(model, tokenizer, grids_of(model) if grids is None else grids)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_missing_package_is_told_of(monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast):
    monkeypatch.setitem(sys.modules, "gguf", None)
    message = refusal(llama(), tokenizer)
    assert message == 'writing a GGUF file needs another package: pip install "trimfit[gguf]"'


def test_other_families_are_refused(tokenizer: PreTrainedTokenizerFast):
    message = refusal(FAMILIES["gpt2"].build(), tokenizer)
    assert message == "a gpt2 model cannot be written as GGUF, only llama, mistral, qwen2, qwen3"


_ROPE = VARIANTS["llama-scaled-positions"].options["rope_parameters"]


@pytest.mark.parametrize(
    ("family", "options", "expected"),
    [
        ("llama", {"attention_bias": True}, "a GGUF file cannot say that attention_bias of a llama model is True"),
        ("llama", {"mlp_bias": True}, "a GGUF file cannot say that mlp_bias of a llama model is True"),
        ("llama", {"hidden_act": "gelu"}, "a GGUF file cannot say that hidden_act of a llama model is gelu"),
        ("qwen3", {"attention_bias": True}, "a GGUF file cannot say that attention_bias of a qwen3 model is True"),
        ("llama", {"rope_parameters": _ROPE}, "the model scales its positions ({'rope_type': 'llama3'"),
        ("mistral", {}, "the model attends to 8 tokens only, which a GGUF file of a mistral model cannot say"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            "the model attends to 8 tokens only, which a GGUF file of a qwen2 model cannot say",
        ),
        (
            "qwen3",
            {"head_dim": 16},
            "the heads of the model have 16 dimensions, but transformers would read 128 from a GGUF file of a qwen3",
        ),
        ("llama", {"dtype": torch.float64}, "model.embed_tokens.weight of torch.float64 has no place in a GGUF file"),
    ],
)
def test_models_that_would_be_read_as_others(
    tokenizer: PreTrainedTokenizerFast, family: str, options: dict[str, Any], expected: str
):
    assert refusal(FAMILIES[family].build(**(SIZES | options)), tokenizer).startswith(expected)


def test_weights_that_have_no_place(tokenizer: PreTrainedTokenizerFast):
    model = llama()
    model.model.layers[1].mlp.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    message = refusal(model, tokenizer)
    assert message == "model.layers.1.mlp.extra of torch.float32 has no place in a GGUF file of a llama"


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        (Grid(3, 32, True), "symmetric grids of 4 or 8 bits, but that of NAME is symmetric with 3"),
        (Grid(4, 32), "symmetric grids of 4 or 8 bits, but that of NAME is asymmetric with 4"),
        (Grid(4, 16, True), "groups of 16 weights in NAME are no multiple of 32, the block of a GGUF file"),
        (Grid(4, 48, True), "groups of 48 weights in NAME are no multiple of 32, the block of a GGUF file"),
    ],
)
def test_grids_that_do_not_fit(tokenizer: PreTrainedTokenizerFast, grid: Grid, expected: str):
    name = "model.layers.1.mlp.down_proj"
    message = refusal(model := llama(), tokenizer, grids_of(model) | {name: grid})
    assert message.endswith(expected.replace("NAME", name))


def test_widths_that_do_not_fit(tmp_path: Path, write: Write, tokenizer: PreTrainedTokenizerFast):
    model = llama(intermediate_size=172)
    grids = {name: FOUR.fitted(model.get_submodule(name).in_features) for name in linear_layers(model)}
    assert refusal(model, tokenizer, grids) == (
        "a GGUF file holds blocks of 32 weights, which do not divide the inputs of model.layers.0.mlp.down_proj with "
        "172 and 1 more; leave such layers as they are with --ignore"
    )
    dense = write(model, {name: grid for name, grid in grids.items() if "down" not in name})
    assert_reads_back(dense, tmp_path)


def test_layers_that_are_none(tokenizer: PreTrainedTokenizerFast):
    assert refusal(llama(), tokenizer, {}).startswith("no layer is quantized, so there is nothing to write as GGUF")
    tied = llama(tie_word_embeddings=True)
    for name in ("lm_head", "model.layers.7.mlp.up_proj", "model.norm"):
        assert refusal(tied, tokenizer, {name: FOUR}).startswith(f"{name} is no layer of the model with weights of its")


@pytest.mark.parametrize("value", [0.1, 1e-9, 1e6])
def test_scales_that_would_be_rounded(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, value: float):
    model = llama()
    done, _ = quantize(model, grids := grids_of(model))
    name = linear_layers(model)[4]
    done[name].scale[3, 1] = value
    with pytest.raises(InputError, match=f"the scales of {name} are not exact in float16, in which a GGUF file"):
        write_gguf(model, tokenizer, grids, done.items(), tmp_path / FILE)


def test_zero_points_that_would_be_lost(tmp_path: Path, tokenizer: PreTrainedTokenizerFast):
    model = llama()
    done, _ = quantize(model, grids := grids_of(model))
    name = linear_layers(model)[4]
    done[name].zero_point[3, 1] = 7
    with pytest.raises(InputError, match=f"the grid of {name} is symmetric, but not all of its zero points are 8"):
        write_gguf(model, tokenizer, grids, done.items(), tmp_path / FILE)


# Tokenizers


def with_bos(backend: Tokenizer, bos: str, eos: str, **options: Any) -> PreTrainedTokenizerFast:
    ids = [(bos, backend.token_to_id(bos))]
    backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, **options)


def byte_level(
    *steps: splitters.PreTokenizer, normalizer: normalizers.Normalizer | None = None, whole: bool = False
) -> PreTrainedTokenizerFast:
    """Byte-level BPE that splits text in `steps`, as GPT-2 does by default."""
    backend = Tokenizer(models.BPE(ignore_merges=whole))
    backend.pre_tokenizer = splitters.Sequence(list(steps or [splitters.ByteLevel(add_prefix_space=False)]))
    if normalizer:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=ROWS - 60,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=sorted(splitters.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([CORPUS], trainer)
    assert backend.get_vocab_size() < ROWS - 10
    return with_bos(backend, "<|begin|>", "<|end|>")


def pieces() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges as SentencePiece has them: each token with all ways to split it, by its score."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splitters.Metaspace()
    backend.train_from_iterator([CORPUS], trainers.BpeTrainer(vocab_size=100, show_progress=False))
    learnt = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *learnt]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [(w[:i], w[i:]) for w in learnt for i in range(1, len(w)) if {w[:i], w[i:]} <= vocabulary.keys()]
    return vocabulary, merges


def sentence_piece(bpe: models.BPE | None = None, prefix: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(bpe or models.BPE(*pieces(), unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    steps = [normalizers.Prepend("▁")] * prefix + [normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(steps)
    return with_bos(backend, "<s>", "</s>", unk_token="<unk>")


_AFTER = splitters.ByteLevel(add_prefix_space=False, use_regex=False)
# The patterns as their models publish them.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace("{1,3}", "")


def split(pattern: str) -> splitters.PreTokenizer:
    return splitters.Split(Regex(pattern), behavior="isolated")


def qwen_2() -> PreTrainedTokenizerFast:
    return byte_level(split(_QWEN_2), _AFTER, normalizer=normalizers.NFC())


def metaspace() -> PreTrainedTokenizerBase:
    """As transformers builds the tokenizers of Llama 1 and 2."""
    vocabulary, merges = pieces()
    return LlamaTokenizer(vocab=vocabulary, merges=merges, add_bos_token=True)


@pytest.mark.parametrize(
    ("family", "build", "texts"),
    [
        ("llama", byte_level, [*TEXTS, "<|begin|>the<|end|>"]),
        ("llama", sentence_piece, [*TEXTS, "</s>the <s>"]),
        ("llama", metaspace, [text for text in TEXTS if not text.startswith(" ")]),
        ("qwen2", qwen_2, [*TEXTS, "e\u0301"]),
    ],
    ids=["gpt-2", "sentence-piece", "metaspace", "qwen2"],
)
def test_transformers_reads_the_same_tokens(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    family: str,
    build: Callable[[], PreTrainedTokenizerBase],
    texts: list[str],
):
    """But for the BOS, which transformers never adds when it reads a GGUF file."""
    tokenizer = build()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    model = FAMILIES[family].build(**SIZES)
    grids = grids_of(model)
    with caplog.at_level(logging.WARNING, "trimfit"):
        write_gguf(model, tokenizer, grids, quantize(model, grids)[0].items(), tmp_path / FILE)
    assert not caplog.records
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    for text in texts:
        plain = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.encode(text) == [tokenizer.bos_token_id, *plain]
        assert loaded.encode(text) == loaded.encode(text, add_special_tokens=False) == plain, text
    assert loaded.chat_template == tokenizer.chat_template


_GPT_2 = splitters.ByteLevel(add_prefix_space=False)


@pytest.mark.parametrize(
    ("name", "build"),
    [
        ("gpt-2", byte_level),
        ("smollm", lambda: byte_level(splitters.Digits(individual_digits=True), _GPT_2)),
        ("llama-bpe", lambda: byte_level(split(_LLAMA_3), _AFTER, whole=True)),
        ("smaug-bpe", lambda: byte_level(split(_LLAMA_3), _AFTER)),
        ("qwen2", lambda: byte_level(split(_QWEN_2), _AFTER)),
        ("qwen2", qwen_2),
    ],
)
def test_ways_to_split_are_recognised(name: str, build: Callable[[], PreTrainedTokenizerFast]):
    metadata = tokenizer_metadata(build(), ROWS)
    assert metadata["tokenizer.ggml.model"] == "gpt2" and metadata["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize(
    "build",
    [
        lambda: byte_level(splitters.ByteLevel(add_prefix_space=True)),
        lambda: byte_level(splitters.Digits(individual_digits=False), _GPT_2),
        lambda: byte_level(split(_LLAMA_3.replace("{1,3}", "{1,2}")), _AFTER),
        lambda: byte_level(_GPT_2, whole=True),
        lambda: byte_level(_GPT_2, normalizer=normalizers.NFC()),
        lambda: byte_level(split(_QWEN_2), _AFTER, normalizer=normalizers.Lowercase()),
    ],
    ids=["space", "digits", "pattern", "whole", "nfc", "lowercase"],
)
def test_other_ways_to_split_are_refused(build: Callable[[], PreTrainedTokenizerFast]):
    assert refusal(llama(), build()) == (
        "the tokenizer splits text in a way that has no name in a GGUF file; known are those of gpt-2, smollm, "
        "llama-bpe, smaug-bpe, qwen2 and SentencePiece"
    )


def test_where_transformers_splits_otherwise_it_is_told(caplog: pytest.LogCaptureFixture):
    model = llama()
    with caplog.at_level(logging.WARNING, "trimfit"):
        check_gguf(model, byte_level(split(_LLAMA_3), _AFTER, whole=True), grids_of(model))
    assert "transformers does not split text as this tokenizer does" in caplog.text


def test_what_is_told_of_a_byte_level_tokenizer():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
    found = {k.removeprefix("tokenizer.ggml."): v for k, v in tokenizer_metadata(tokenizer, ROWS).items()}
    size = len(tokenizer)
    assert found["tokens"][:size] == tokenizer.convert_ids_to_tokens(range(size))
    assert found["tokens"][size:] == [f"<unused row {i}>" for i in range(size, ROWS)]
    assert found["token_type"] == [3, 3, *[1] * (size - 4), 4, 3, *[5] * (ROWS - size)]
    assert (found["bos_token_id"], found["eos_token_id"], found["padding_token_id"]) == (0, 1, size - 1)
    assert (found["add_bos_token"], found["add_eos_token"]) == (True, False)
    assert "unknown_token_id" not in found and "scores" not in found and "add_space_prefix" not in found


@pytest.mark.parametrize("prefix", [True, False])
def test_what_is_told_of_a_sentence_piece_tokenizer(prefix: bool):
    tokenizer = sentence_piece(prefix=prefix)
    found = {k.removeprefix("tokenizer.ggml."): v for k, v in tokenizer_metadata(tokenizer, len(tokenizer)).items()}
    assert (found["model"], found["pre"], found["add_space_prefix"]) == ("llama", "default", prefix)
    assert found["token_type"] == [2, 3, 3, *[6] * 256, *[1] * (len(tokenizer) - 259)]
    assert [found[f"{key}_token_id"] for key in ("unknown", "bos", "eos")] == [0, 1, 2]


@pytest.mark.parametrize("text", TEXTS)
def test_scores_give_the_same_tokens_as_merges(text: str):
    """Of all neighbours that together are a token, llama.cpp joins those with the highest score, the leftmost first."""
    tokenizer = sentence_piece()
    metadata = tokenizer_metadata(tokenizer, len(tokenizer))
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(symbols)) if a + b in scores]
        if not pairs:
            break
        i = -max(pairs)[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    tokens = [
        token
        for symbol in symbols
        for token in ([symbol] if symbol in scores else [f"<0x{byte:02X}>" for byte in symbol.encode()])
    ]
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False)) == tokens


def test_merges_that_scores_cannot_express():
    vocabulary, merges = pieces()
    several = next(i for i in range(len(merges)) if "".join(merges[i]) == "".join(merges[i + 1]))

    def message(changed: list[tuple[str, str]]) -> str:
        return refusal(llama(), sentence_piece(models.BPE(vocabulary, changed, unk_token="<unk>", byte_fallback=True)))

    apart = [*merges[:several], *merges[several + 1 :], merges[several]]
    token = "".join(merges[several])
    assert message(apart) == f"the merges into {token!r} are apart, so a GGUF file cannot score the tokenizer"
    incomplete = [*merges[:several], *merges[several + 1 :]]
    left, right = merges[several]
    assert message(incomplete) == (
        f"the tokenizer does not merge {left!r} and {right!r} into {token!r}, as SentencePiece would, so a GGUF file "
        "cannot score it"
    )


def test_bpe_that_cannot_be_held():
    vocabulary, merges = pieces()

    def message(tokenizer: PreTrainedTokenizerBase) -> str:
        return refusal(llama(), tokenizer)

    words = make_word_tokenizer()
    assert message(words).startswith("the tokenizer is a WordLevel, but a GGUF file of these models holds BPE")
    bpe = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, dropout=0.5)
    assert message(sentence_piece(bpe)) == "the tokenizer has dropout 0.5, which a GGUF file cannot hold"
    bpe = models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    assert message(sentence_piece(bpe)) == "the tokenizer has no merges, which a GGUF file must have"
    spaced = {**vocabulary, " ": len(vocabulary), " t": len(vocabulary) + 1}
    bpe = models.BPE(spaced, [(" ", "t")], unk_token="<unk>", byte_fallback=True)
    assert message(sentence_piece(bpe)).startswith("the tokenizer merges tokens that contain spaces")
    other = {token.replace("<0x41>", "<A>"): i for token, i in vocabulary.items()}
    bpe = models.BPE(other, merges, unk_token="<unk>", byte_fallback=True)
    assert message(sentence_piece(bpe)).startswith("the tokenizer falls back on bytes but has no token <0x41>")
    tokenizer = sentence_piece()
    tokenizer.backend_tokenizer.pre_tokenizer = splitters.Whitespace()
    assert message(tokenizer).startswith("the tokenizer falls back on bytes but treats spaces in another way")


def test_special_tokens_that_cannot_be_held():
    tokenizer = byte_level()
    tokenizer.add_tokens([AddedToken("<tool>", lstrip=True)])
    message = refusal(llama(), tokenizer)
    assert message == "the token '<tool>' of the tokenizer has lstrip, which a GGUF file cannot hold"
    tokenizer = byte_level()
    ids = [("<|end|>", 1), ("A", 3)]
    around = processors.TemplateProcessing(single="<|end|> $A A", special_tokens=ids)
    tokenizer.backend_tokenizer.post_processor = around
    message = refusal(llama(), tokenizer)
    assert message.startswith("the tokenizer puts other tokens than BOS and EOS around a text")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level().backend_tokenizer, eos_token=None)
    assert refusal(llama(), tokenizer).startswith("the tokenizer has no EOS token")


def test_without_a_bos_the_eos_stands_for_it(tmp_path: Path):
    """transformers cannot read the tokenizer of a llama without one."""
    backend = byte_level().backend_tokenizer
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=None, eos_token="<|end|>")
    metadata = tokenizer_metadata(tokenizer, ROWS)
    assert metadata["tokenizer.ggml.bos_token_id"] == 1 and not metadata["tokenizer.ggml.add_bos_token"]
    model = llama()
    grids = grids_of(model)
    write_gguf(model, tokenizer, grids, quantize(model, grids)[0].items(), tmp_path / FILE)
    loaded = AutoTokenizer.from_pretrained(tmp_path, gguf_file=FILE)
    assert loaded.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_more_tokens_than_rows(tokenizer: PreTrainedTokenizerFast):
    message = refusal(llama(vocab_size=100), tokenizer)
    assert "but the model embeds only 100 tokens" in message
