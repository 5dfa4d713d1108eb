"""Windows that a model writes itself: the right distribution, repeatable, cut as a stream of documents or chats."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, VOCABULARY, for_each, make_word_tokenizer
from pydantic import ValidationError
from tokenizers import processors
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from trimfit.calibration import (
    CalibrationConfig,
    SelfSample,
    added_tokens,
    read_token_ids,
    sample_from_model,
    windows_from_ids,
)
from trimfit.calibration.self_sampling import repetition
from trimfit.calibration.turns import Place, Then, make_script
from trimfit.checkpoints import load_checkpoint
from trimfit.demo.run import model_path
from trimfit.errors import InputError

BOS, EOS = 1, 2
CACHED = {name: FAMILIES[name] for name in ("llama", "gemma2", "gpt2", "opt", "gpt_neox")}


def bigram_model(logits: Tensor, context: int = 512) -> LlamaForCausalLM:
    """A Llama whose logits after token i are `logits[i]`, (V, V), whatever was before it."""
    size = len(logits)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        head_dim=2,
        max_position_embeddings=context,
    )
    model = LlamaForCausalLM(config).eval()
    layer = model.model.layers[0]
    with torch.no_grad():
        for silenced in (layer.self_attn.o_proj, layer.mlp.down_proj):
            silenced.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.copy_(logits.T / size**0.5)  # the last norm scales a unit vector by √V
    return model


def with_template(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """Makes the tokenizer put the tokens named in `template` around a text."""
    special = [(token, i) for token, i in tokenizer.get_vocab().items() if token in template.split()]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    return tokenizer


@pytest.fixture
def bos_tokenizer() -> PreTrainedTokenizerFast:
    """Of the words of `families`; begins a text with w1."""
    return with_template(make_word_tokenizer(), "w1 $A")


def expected_tokens(model: PreTrainedModel, windows: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """What each position but the first must hold given those before it, and the entropies: one plain forward pass."""
    with torch.no_grad():
        probabilities = model(input_ids=windows, use_cache=False).logits[:, :-1].double().softmax(-1)
    uniforms = 1 - torch.rand(windows.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    tokens = torch.searchsorted(probabilities.cumsum(-1), uniforms[:, 1:, None].contiguous()).squeeze(-1)
    return tokens, torch.special.entr(probabilities).sum(-1)


@for_each(CACHED)
def test_each_token_is_drawn_from_what_the_whole_window_says(family: Any) -> None:
    """So the cache, positions and sliding windows are right, and nothing is cut off; in batches of any size."""
    model, tokenizer = family.build(), make_word_tokenizer()
    sample = sample_from_model(model, tokenizer, samples=5, length=32, seed=7)
    assert sample.windows.shape == (5, 32)
    assert sample.windows.dtype == torch.int64
    tokens, entropies = expected_tokens(model, sample.windows, seed=7)
    assert torch.equal(sample.windows[:, 1:], tokens)
    assert sample.entropy == pytest.approx(entropies.mean().item(), abs=1e-5)
    for batch_size in (1, 3):
        again = sample_from_model(model, tokenizer, samples=5, length=32, seed=7, batch_size=batch_size)
        assert torch.equal(again.windows, sample.windows)


def test_frequencies_follow_the_distribution() -> None:
    size = 8
    logits = 1.5 * torch.randn(size, size, generator=torch.Generator().manual_seed(3))
    sample = sample_from_model(bigram_model(logits), make_word_tokenizer(size), samples=64, length=256, seed=0)
    pairs = Counter(pair for window in sample.windows.tolist() for pair in pairwise(window))
    probabilities = logits.double().softmax(-1)
    statistic = 0.0
    for i in range(size):
        total = sum(pairs[i, j] for j in range(size))
        expected = total * probabilities[i]
        statistic += sum((pairs[i, j] - float(expected[j])) ** 2 / float(expected[j]) for j in range(size))
    freedom = size * (size - 1)
    assert abs(statistic - freedom) < 4 * math.sqrt(2 * freedom)


def test_seeds(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama"].build()
    state = torch.get_rng_state()
    first = sample_from_model(model, bos_tokenizer, samples=4, length=16, seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, other, more = (
        sample_from_model(model, bos_tokenizer, samples=samples, length=16, seed=seed).windows
        for samples, seed in ((4, 0), (4, 1), (9, 0))
    )
    assert torch.equal(again, first.windows)
    assert torch.equal(more[:4], first.windows), "fewer windows are the first of more"
    assert not torch.equal(other, first.windows)
    assert (other[:, 0] == BOS).all()
    assert len({tuple(window) for window in other.tolist()}) == 4


def test_the_model_is_left_as_it_was_and_its_generation_config_is_not_heeded() -> None:
    model, tokenizer = FAMILIES["gpt2"].build(attn_pdrop=0.5, resid_pdrop=0.5), make_word_tokenizer()
    plain = sample_from_model(model, tokenizer, samples=2, length=16, seed=0)
    settings = {"temperature": 0.01, "top_k": 1, "max_new_tokens": 3, "repetition_penalty": 9.0, "do_sample": False}
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    model.config.use_cache = False
    before = model.generation_config.to_dict()
    model.train()
    model.transformer.h[0].eval()
    training = [module.training for module in model.modules()]
    assert torch.equal(sample_from_model(model, tokenizer, samples=2, length=16, seed=0).windows, plain.windows)
    assert [module.training for module in model.modules()] == training
    assert model.generation_config.to_dict() == before
    assert not model.config.use_cache
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_other_dtypes(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    model = FAMILIES["llama"].build().bfloat16()
    sample = sample_from_model(model, bos_tokenizer, samples=2, length=8, seed=0)
    assert 0 < sample.entropy < sample.largest_entropy == pytest.approx(math.log(VOCABULARY))


def ends_often(size: int = VOCABULARY) -> LlamaForCausalLM:
    """One token in five is EOS, BOS is hardly ever written, any other as likely."""
    logits = torch.zeros(size, size)
    logits[:, EOS] = math.log(0.25 * (size - 2))
    logits[:, BOS] = -30
    return bigram_model(logits)


def test_a_text_that_ended_is_followed_by_the_next_with_its_bos(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    sample = sample_from_model(ends_often(), bos_tokenizer, samples=8, length=64, seed=0)
    windows = sample.windows
    after = windows[:, 1:][windows[:, :-1] == EOS]
    assert len(after) > 30
    assert (after == BOS).all()
    assert (windows == BOS).sum() == len(windows) + len(after)
    share = torch.full((63,), 0.8 / 62).double()
    share[0] = 0.2
    assert sample.entropy == pytest.approx(torch.special.entr(share).sum().item(), abs=1e-3), "BOS was not drawn"


@pytest.mark.parametrize(
    ("template", "opening", "again"),
    [
        ("w1 $A", [BOS], [BOS]),
        ("w1 $A w2", [BOS], [BOS]),
        ("w2 $A", [EOS], []),  # EOS is BOS: it is not doubled
        ("w1 w3 $A", [BOS, 3], [BOS, 3]),
        ("$A", [EOS], None),  # nothing is put between texts, but something must be first
    ],
)
def test_openings(template: str, opening: list[int], again: list[int] | None) -> None:
    tokenizer = with_template(make_word_tokenizer(), template)
    script = make_script(tokenizer, set(range(VOCABULARY)), 16)
    assert script.opening == opening
    assert script.turns == [{} if again is None else {EOS: Then(again, 0)}]
    assert added_tokens(tokenizer).before == ([] if again is None else opening)


def test_bos_that_is_only_named_is_better_than_none() -> None:
    tokenizer = make_word_tokenizer()
    tokenizer.eos_token = None
    assert make_script(tokenizer, set(range(VOCABULARY)), 16).opening == [BOS]


def test_without_bos_and_eos_any_token_begins() -> None:
    tokenizer = make_word_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    windows = sample_from_model(ends_often(), tokenizer, samples=640, length=2, seed=0).windows
    counts = torch.bincount(windows[:, 0], minlength=VOCABULARY)
    assert ((counts - 10.0) ** 2 / 10).sum() < VOCABULARY + 4 * math.sqrt(2 * VOCABULARY)
    again = sample_from_model(ends_often(), tokenizer, samples=640, length=2, seed=0, batch_size=7)
    assert torch.equal(again.windows, windows)


@pytest.mark.parametrize(("rows", "words"), [(VOCABULARY, 40), (40, VOCABULARY)])
def test_only_tokens_that_both_model_and_tokenizer_have(rows: int, words: int) -> None:
    logits = torch.zeros(rows, rows)
    logits[:, words:] = 50  # rows that pad the vocabulary, and would be drawn each time
    sample = sample_from_model(bigram_model(logits), make_word_tokenizer(words), samples=8, length=64, seed=0)
    assert len(sample.windows.unique()) == 40
    assert sample.windows.max() == 39
    assert sample.entropy == pytest.approx(math.log(40)) == sample.largest_entropy


CHAT = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|start|>' + m.role + '\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant\n' }}{% endif %}"
)
INSTRUCTION = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<s>[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"
)


@pytest.fixture
def chat_tokenizer(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer("<s> $A")
    tokenizer.add_tokens(["<|start|>", "<|end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    return tokenizer


def likely(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> LlamaForCausalLM:
    """A model that writes these tokens, each as likely, and no others."""
    logits = torch.full((len(tokenizer) + 8,) * 2, -50.0)
    logits[:, tokenizer.convert_tokens_to_ids(list(tokens))] = 0
    return bigram_model(logits)


def test_a_chat_model_asks_and_answers(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    model = likely(chat_tokenizer, ["a", "b", "c", "<|end|>"])
    windows = sample_from_model(model, chat_tokenizer, samples=4, length=256, seed=0).windows
    question, answer = r"<s><\|start\|>user\n[abc]*<\|end\|>\n", r"<\|start\|>assistant\n[abc]*<\|end\|>\n"
    for window in windows:
        text = chat_tokenizer.decode(window)
        whole, cut = text[: text.rindex("<s>")], text[text.rindex("<s>") :]
        assert len(whole) > 100
        assert re.fullmatch(rf"({question}{answer})+", whole), whole
        assert cut.startswith("<s><|start|>user\n"[: len(cut)])


def test_a_chat_whose_question_has_no_token_to_end_it(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    chat_tokenizer.chat_template = INSTRUCTION
    script = make_script(chat_tokenizer, set(range(len(chat_tokenizer))), 64)
    assert chat_tokenizer.decode(script.opening) == "<s>[INST] "
    again = Then(script.opening, 0)
    assert script.turns == [{chat_tokenizer.eos_token_id: again}] * 2


def test_places_are_independent() -> None:
    script = make_script(with_template(make_word_tokenizer(), "w1 w3 $A"), set(range(VOCABULARY)), 16)
    first, second = Place(script), Place(script)
    assert [first.take(token) for token in (7, EOS, 8, 9, EOS, 8)] == [
        (7, True),
        (EOS, True),
        (BOS, False),
        (3, False),
        (EOS, True),
        (BOS, False),
    ]
    assert second.take(8) == (8, True)


@pytest.mark.parametrize(
    ("template", "rows", "reason"),
    [
        ("{{ raise_exception('no system') }}", 302, "no system"),
        ("{% for %}", 302, "Expected"),
        ("{{ messages[0].content }}", 302, "nothing opens"),
        ("always the same", 302, "nothing opens"),
        (CHAT.replace("<s>", "x y " * 20), 302, "of a window of 32"),
        (CHAT, 301, "does not know"),
    ],
)
def test_a_template_of_no_use_is_said_and_texts_are_written(
    chat_tokenizer: PreTrainedTokenizerFast, template: str, rows: int, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = FAMILIES["llama"].build(vocab_size=rows)
    chat_tokenizer.chat_template = None
    expected = sample_from_model(model, chat_tokenizer, samples=2, length=32, seed=0)
    caplog.clear()
    chat_tokenizer.chat_template = template
    sample = sample_from_model(model, chat_tokenizer, samples=2, length=32, seed=0)
    assert torch.equal(sample.windows, expected.windows)
    warning = caplog.records[0].getMessage()
    assert warning.startswith("the chat template is not used (")
    assert reason in warning


def test_trained_models_write_what_looks_like_text(caplog: pytest.LogCaptureFixture) -> None:
    embedded = load_checkpoint(str(model_path()))
    sample = sample_from_model(embedded.model, embedded.tokenizer, samples=8, length=96, seed=0)
    assert 2 < sample.entropy < 0.6 * sample.largest_entropy
    assert sample.repetition < 0.1
    assert sample.problem() is None
    assert not [record for record in caplog.records if record.name.startswith("trimfit")]
    with torch.no_grad():
        embedded.model.model.norm.weight *= 50  # all but greedy: small models loop
    sample = sample_from_model(embedded.model, embedded.tokenizer, samples=8, length=192, seed=0)
    assert sample.repetition > 0.7
    assert "the model repeats itself (" in caplog.text
    assert "calibrate on real text instead" in caplog.text


def test_fresh_weights_write_noise(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    config = FAMILIES["llama"].build().config
    sample = sample_from_model(LlamaForCausalLM(config), make_word_tokenizer(), samples=4, length=32, seed=0)
    assert sample.entropy > 0.95 * sample.largest_entropy
    assert sample.repetition == 0
    assert "the model writes noise (" in caplog.text
    assert "calibrate on real text instead" in caplog.text


def test_a_loop_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    logits = torch.zeros(VOCABULARY, VOCABULARY)
    logits[torch.arange(VOCABULARY), (torch.arange(VOCABULARY) + 1) % 12] = 20
    sample = sample_from_model(bigram_model(logits), make_word_tokenizer(), samples=4, length=128, seed=0)
    assert sample.repetition > 0.8
    assert sample.entropy < 0.01
    assert "the model repeats itself" in caplog.text


def test_repetition_counts_what_was_drawn() -> None:
    windows = torch.tensor([[1, 2, 3, 4, 1, 2, 3, 4], [5, 6, 7, 8, 9, 1, 2, 3]])
    everything = torch.ones_like(windows, dtype=torch.bool)
    assert repetition(windows, everything) == pytest.approx(1 / 10), "windows are compared with themselves alone"
    assert repetition(windows[:1], everything[:1] & (windows[:1] == 4)) == pytest.approx(1 / 2)
    assert repetition(windows[:, :3], everything[:, :3]) == 0
    assert repetition(windows, ~everything) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_no_numbers(value: float) -> None:
    model = FAMILIES["llama"].build()
    with torch.no_grad():
        model.lm_head.weight[5, 3] = value
    with pytest.raises(InputError, match="NaN or infinite logits on its own text: its weights are damaged or"):
        sample_from_model(model, make_word_tokenizer(), samples=1, length=8, seed=0)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"samples": 0}, "at least 1 window is needed, but 0"),
        ({"length": 1}, "at least 2 tokens, but 1"),
        ({"batch_size": 0}, "written at a time, but 0"),
        ({"length": 65}, "windows of 65 tokens were asked for, but the model's context is 64; ask for shorter"),
    ],
)
def test_numbers_out_of_range(options: dict[str, int], part: str) -> None:
    numbers = {"samples": 1, "length": 8, "seed": 0} | options
    with pytest.raises(InputError, match=part):
        sample_from_model(FAMILIES["llama"].build(), make_word_tokenizer(), **numbers)


def test_openings_that_do_not_fit() -> None:
    tokenizer = with_template(make_word_tokenizer(), "w1 w3 $A")
    with pytest.raises(InputError, match="begins a text with 2 tokens, so a window needs more than 2"):
        sample_from_model(FAMILIES["llama"].build(), tokenizer, samples=1, length=2, seed=0)
    tokenizer = with_template(make_word_tokenizer(), "w50 $A")
    with pytest.raises(InputError, match=r"begins a text with the tokens \[50\], but the model does not know them"):
        sample_from_model(ends_often(40), tokenizer, samples=1, length=8, seed=0)


def test_kept_windows_come_back_in_their_order(tmp_path: Path) -> None:
    windows = torch.randint(0, 50_000, (7, 5), generator=torch.Generator().manual_seed(0))
    SelfSample(windows, 1.0, 2.0, 0.0).save(tmp_path / "calibration.npy", seed=3)
    ids = read_token_ids(tmp_path / "calibration.npy")
    assert torch.equal(windows_from_ids(ids, samples=7, length=5, seed=3), windows)
    other = windows_from_ids(ids, samples=7, length=5, seed=4)
    assert sorted(other.tolist()) == sorted(windows.tolist())
    assert not torch.equal(other, windows)


def test_as_a_calibration_source(
    bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "self").write_text("w9 " * 100)
    monkeypatch.chdir(tmp_path)
    model = FAMILIES["llama"].build()
    config = CalibrationConfig(source="self", samples=3, seed=5)
    windows, sample = config.draw(bos_tokenizer, model, batch_size=2)
    assert sample is not None and torch.equal(windows, sample.windows)
    assert sample.windows.shape == (3, 64), "the model's context"
    assert torch.equal(config.windows(bos_tokenizer, model), sample.windows)
    drawn = sample_from_model(model, bos_tokenizer, samples=3, length=64, seed=5)
    assert torch.equal(drawn.windows, sample.windows)
    file = CalibrationConfig(source="./self", samples=1, sequence_length=8)
    windows, sample = file.draw(bos_tokenizer, model)
    assert sample is None and windows.tolist() == [[BOS] + [9] * 7]


def test_beside_a_text(bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The model's own windows, as it would write them alone, among those of the text, as they would be without them."""
    text = tmp_path / "text.txt"
    text.write_text("w9 w8 " * 100)
    model = FAMILIES["llama"].build()
    config = CalibrationConfig(source=str(text), samples=3, own_samples=2, sequence_length=8, seed=5)
    windows, sample = config.draw(bos_tokenizer, model)
    assert (config.count, config.written) == (5, 2)
    own = sample_from_model(model, bos_tokenizer, samples=2, length=8, seed=5)
    assert sample is not None and torch.equal(sample.windows, own.windows)
    given = config.model_copy(update={"own_samples": 0}).windows(bos_tokenizer, model)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(5))
    assert torch.equal(windows, torch.cat([given, own.windows])[order])
    again, same = config.draw(bos_tokenizer, model, sample=sample)
    assert same is sample and torch.equal(again, windows)


def test_ids_that_the_model_does_not_know_are_refused_before_it_writes(
    bos_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.save(tmp_path / "ids.npy", np.full((2, 8), 99_999, dtype=np.int32))
    monkeypatch.setattr("trimfit.calibration.config.sample_from_model", lambda *a, **k: pytest.fail("it wrote"))
    config = CalibrationConfig(source=str(tmp_path / "ids.npy"), samples=2, own_samples=2, sequence_length=8)
    with pytest.raises(InputError, match="99999"):
        config.draw(bos_tokenizer, FAMILIES["llama"].build())


def test_a_model_that_writes_all_windows_writes_none_beside_them() -> None:
    with pytest.raises(ValidationError, match="own_samples are windows beside those of a text"):
        CalibrationConfig(source="self", own_samples=1)
