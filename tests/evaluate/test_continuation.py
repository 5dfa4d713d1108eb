"""Questions made from a text."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimfit.calibration.standard_library import EVALUATION, read_modules
from trimfit.errors import InputError
from trimfit.evaluate.continuation import CHOICES, EXAMPLES, continuation_examples

WORDS = st.lists(st.text("abcdeéß,.", min_size=1, max_size=9), min_size=40, max_size=400)


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return read_modules(EVALUATION)


def test_the_answer_is_what_the_text_says_and_the_other_choices_are_from_elsewhere(documents: list[str]) -> None:
    examples = continuation_examples(documents)
    assert len(examples) == EXAMPLES
    whole = "\0".join(documents)
    for example in examples:
        context, choices = example["context"], example["choices"]
        assert len(set(choices)) == CHOICES
        assert context + choices[example["answer"]] in whole
        assert all(choice in whole for choice in choices)
        assert 200 <= len(context) <= 400
        for choice in choices:
            assert 20 <= len(choice) <= 60
            assert choice[0].isspace() and not choice[-1].isspace() and not context[-1].isspace()


def test_no_passage_is_asked_twice(documents: list[str]) -> None:
    contexts = [example["context"] for example in continuation_examples(documents)]
    assert len(set(contexts)) == len(contexts)


def test_the_first_of_them_come_from_every_document(documents: list[str]) -> None:
    first = continuation_examples(documents)[:60]
    seen = [document for document in documents if any(example["context"] in document for example in first)]
    assert len(seen) >= 6  # of ten: a limit must not ask about one module only


def test_the_right_place_is_no_hint(documents: list[str]) -> None:
    places = [example["answer"] for example in continuation_examples(documents)]
    assert all(65 <= places.count(place) <= 135 for place in range(CHOICES))


def test_the_same_text_asks_the_same_questions(documents: list[str]) -> None:
    assert continuation_examples(documents) == continuation_examples(list(documents))


@settings(max_examples=20, deadline=None)
@given(WORDS)
def test_any_text_gives_sound_questions_or_a_reason(words: list[str]) -> None:
    text = " ".join(words)
    try:
        examples = continuation_examples([text])
    except InputError as error:
        assert re.search(r"\d+ passages", str(error))
        return
    for example in examples:
        assert example["context"] + example["choices"][example["answer"]] in text
        assert len(set(example["choices"])) == CHOICES


@pytest.mark.parametrize("text", ["too short", "word " * 40, "x" * 5000])
def test_a_text_without_passages_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"passages.*longer text"):
        continuation_examples([text])
