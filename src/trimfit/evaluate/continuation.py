"""Multiple-choice questions made from any text: which of four continues this passage?"""

import random
import re
from collections.abc import Sequence
from typing import TypedDict

from trimfit.errors import InputError

CHOICES = 4
EXAMPLES = 400

# Some 200 characters, then the next 20 or so. A passage ends where a word does, so that white space begins the
# continuation and no token straddles the two. Text without white space for long (tables, data) gives no passage.
_PASSAGE = re.compile(r"(\S.{198,398}?\S)(\s.{18,58}?\S)(?=\s)", re.DOTALL)


class Example(TypedDict):
    """One question: `choices[answer]` is what follows `context` in the text."""

    context: str
    choices: list[str]
    answer: int


def continuation_examples(documents: Sequence[str]) -> list[Example]:
    """Questions from `documents`, the same ones in the same order whenever the text is the same.

    Documents are cut in passages that do not overlap. Of them at most 400 are drawn; each is to be continued, by the
    true text or by what follows three other passages drawn from all the documents. Wrong choices differ from the true
    one and from each other; the right one is equally often in each place.

    Raises `InputError` when the text has too few passages to choose from.
    """
    passages: list[tuple[str, str]] = [pair for text in documents for pair in _PASSAGE.findall(text)]
    continuations = sorted({continuation for _, continuation in passages})
    if len(continuations) < CHOICES:
        raise InputError(
            f"the text has {len(continuations)} passages of 220 characters in words, but a choice among {CHOICES} "
            "needs as many; give a longer text"
        )
    draw = random.Random(0)  # always the same: tables of different models and seeds must ask the same questions
    return [
        _example(context, true, continuations, draw)
        for context, true in draw.sample(passages, min(EXAMPLES, len(passages)))
    ]


def _example(context: str, true: str, continuations: list[str], draw: random.Random) -> Example:
    others = [other for other in draw.sample(continuations, CHOICES) if other != true][: CHOICES - 1]
    answer = draw.randrange(CHOICES)
    return {"context": context, "choices": [*others[:answer], true, *others[answer:]], "answer": answer}
