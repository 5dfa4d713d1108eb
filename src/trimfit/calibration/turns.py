"""How a window that a model writes begins, and what is put after the end of a text in it."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from trimfit.calibration.windows import added_tokens
from trimfit.errors import InputError, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# No two begin or end alike, so whatever is the same around all of them belongs to the template.
_CONTENTS = ("Why is the sky blue?", "hello", "Name 3 rivers")


class Then(NamedTuple):
    """What follows the end of a text: these ids as they are, then a text of the given turn."""

    ids: list[int]
    turn: int


class Script(NamedTuple):
    """What is fixed in windows of a model's own text.

    - `opening`: ids that every window begins with; [] when the tokenizer has none for it.
    - `turns`: the kinds of text, the first of which follows the opening: for each the ids that end it, and what then.
    """

    opening: list[int]
    turns: list[dict[int, Then]]


class Place:
    """How far one window has come in a script."""

    def __init__(self, script: Script):
        self._script = script
        self._turn = 0
        self._fixed: list[int] = []

    def take(self, drawn: int) -> tuple[int, bool]:
        """The next token, and whether it is the one that was drawn rather than one that is fixed."""
        if self._fixed:
            return self._fixed.pop(0), False
        then = self._script.turns[self._turn].get(drawn)
        if then is not None:
            self._fixed, self._turn = list(then.ids), then.turn
        return drawn, True


def make_script(tokenizer: "PreTrainedTokenizerBase", known: set[int], length: int) -> Script:
    """How windows of `length` tokens begin and go on: as chats where there is a template, else as documents.

    `known` are the ids that may be used. A template that cannot be used is logged, and documents are written instead.
    Raises `InputError` when what the tokenizer puts before a text is unknown or leaves no room.
    """
    if getattr(tokenizer, "chat_template", None):
        try:
            return _chats(tokenizer, known, length)
        except Exception as error:  # a template is a program by strangers: it may raise anything
            log.warning("the chat template is not used (%s): calibration windows are plain text", first_line(error))
    return _documents(tokenizer, known, length)


def _documents(tokenizer: "PreTrainedTokenizerBase", known: set[int], length: int) -> Script:
    """A stream of documents like the one that `sample_windows` cuts: each begins with what the tokenizer puts there.

    Where the tokenizer puts nothing, nothing is put between documents either. The window then begins with EOS, which
    models without BOS are trained to see between documents, or else with a BOS that has a name but is not added.
    """
    before = added_tokens(tokenizer).before
    end: Any = tokenizer.eos_token_id  # hardly any tokenizer adds it, but models write it
    if not before:
        return Script([token for token in (end, tokenizer.bos_token_id) if token in known][:1], [{}])
    if not known.issuperset(before):
        raise InputError(f"the tokenizer begins a text with the tokens {before}, but the model does not know them all")
    if len(before) >= length:
        raise InputError(f"the tokenizer begins a text with {len(before)} tokens, so a window needs more than {length}")
    again = before[1:] if before[0] == end else before  # where EOS is BOS too, it is not doubled
    return Script(before, [{} if end is None else {end: Then(again, 0)}])


def _chats(tokenizer: "PreTrainedTokenizerBase", known: set[int], length: int) -> Script:
    """Conversations of a question and an answer, one after the other, all by the model.

    The template opens the user's turn, and the model writes the question. Where a single token ends it, the template
    opens the answer; without one the model writes that part too. After the answer the next conversation begins.
    """
    questions = [_render(tokenizer, [("user", text)], answer=False) for text in _CONTENTS]
    asked = [_render(tokenizer, [("user", text)], answer=True) for text in _CONTENTS]
    answered = [_render(tokenizer, [("user", "?"), ("assistant", text)], answer=False) for text in _CONTENTS]
    opening, to_answer, closing = _same_start(questions), _same_end(asked), _same_end(answered)
    if not opening or opening in questions:
        raise InputError("nothing opens the user's turn")
    if not known.issuperset([*opening, *to_answer, *closing]):
        raise InputError("it has tokens that the model does not know")
    if len(opening) + len(to_answer) > length // 2:
        raise InputError(f"it takes {len(opening) + len(to_answer)} tokens of a window of {length}")
    end: Any = tokenizer.eos_token_id
    question, answer = ({} if end is None else {end: Then(opening, 0)} for _ in range(2))
    single: Any = tokenizer.added_tokens_decoder  # those that are never pieces of a text
    if to_answer and to_answer[0] in single:
        question[to_answer[0]] = Then(to_answer[1:], 1)
    if closing and closing[0] in single:
        answer[closing[0]] = Then([*closing[1:], *opening], 0)
    return Script(opening, [question, answer])


def _render(tokenizer: "PreTrainedTokenizerBase", messages: list[tuple[str, str]], *, answer: bool) -> list[int]:
    """Ids of a conversation, with the opening of the next answer if asked for."""
    conversation = [{"role": role, "content": content} for role, content in messages]
    untyped: Any = tokenizer
    text = untyped.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer)
    return list(untyped(text, add_special_tokens=False, verbose=False).input_ids)  # the template itself writes BOS


def _same_start(sequences: Sequence[list[int]]) -> list[int]:
    same: list[int] = []
    for column in zip(*sequences, strict=False):
        if len(set(column)) > 1:
            break
        same.append(column[0])
    return same


def _same_end(sequences: Sequence[list[int]]) -> list[int]:
    return _same_start([sequence[::-1] for sequence in sequences])[::-1]
