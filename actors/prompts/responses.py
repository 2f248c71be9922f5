"""Responses of a data set, for `estimator: sft`: turned into tokens once, with the prompts.

A conversation is rendered by the chat template as a whole and cut where the texts of its first messages end:

    prompt                     turn (trained)       between (context)                turn (trained)
    <user>1+1=<eos><assistant> 2<eos>               <user>And 2+2?<eos><assistant>   4<eos>

All turns of the assistant after the prompt are trained on; what the template, the user or a tool writes between them is context,
as what an environment writes is. Shapes: M prompts, N response tokens of all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from actors.config import SourceConfig
from actors.data.messages import conversation_of, in_json
from actors.errors import UserError
from actors.prompts.columns import many_rows
from actors.prompts.texts import Reader
from actors.trajectory import offsets_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Piece = tuple[str, bool]
"""A part of a text, and whether it is trained on."""


class Ends(NamedTuple):
    """How a response ends."""

    stop: Sequence[int]
    """The tokens at which generation stops."""
    written: int
    """The one that ends a response whose text has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Responses:
    """The responses to M prompts, uncut."""

    tokens: np.ndarray
    """[N] int32."""
    offsets: np.ndarray
    """[M + 1] int64."""
    trained: np.ndarray
    """[N] bool: the assistant wrote the token."""

    def lengths(self, most: int) -> np.ndarray:
        """[M] tokens of each response, where a longer one is cut at `most`."""
        return np.minimum(np.diff(self.offsets), most)

    def take(self, rows: np.ndarray) -> Responses:
        """The responses to the prompts with these numbers, ascending [m]."""
        return Responses(
            tokens=many_rows(self.tokens, self.offsets, rows),
            offsets=offsets_of(np.diff(self.offsets)[rows]),
            trained=many_rows(self.trained, self.offsets, rows),
        )


def prompt_of(record_prompt: Any, response: Any, same: bool, source: SourceConfig, chat: bool, where: str) -> Any:
    """The prompt of a record with a response: in a chat the messages before the first answer that is trained on.

    same: prompt and response are one field, a whole conversation. UserError: the response is none.
    """
    if not chat:
        if same or not isinstance(response, str) or not response:
            raise UserError(where, f"{source.response_field} = {in_json(response)}", "a string (chat is false)")
        return record_prompt
    messages, first = _conversation(record_prompt, response, same, source, where)
    return messages[:first]


def pieces_of(
    reader: Reader,
    record_prompt: Any,
    response: Any,
    same: bool,
    record: dict[str, Any],
    source: SourceConfig,
    where: str,
) -> list[Piece]:
    """The text of a record in pieces: the prompt, then turns of the assistant and what is between them; it ends with a turn.

    UserError: the response is none, or the chat template writes a message otherwise where others follow it.
    """
    if not reader.section.chat:
        return [(record_prompt, False), (response, True)]
    messages, first = _conversation(record_prompt, response, same, source, where)
    whole = reader.render(messages, record, source, where, add_generation_prompt=False)
    pieces: list[Piece] = []
    done = ""
    for number in range(first, len(messages)):
        if messages[number]["role"] != "assistant":
            continue
        before = reader.render(messages[:number], record, source, where, add_generation_prompt=True)
        after = reader.render(messages[: number + 1], record, source, where, add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before) and whole.startswith(after)):
            found = f"a conversation in which the chat template writes message {number + 1} otherwise where others follow it"
            way_out = "prompts.chat_template_arguments may name a chat_template that does not"
            raise UserError(
                where,
                found,
                f"one that begins with the text of its first messages, so that turns can be told ({way_out})",
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def _conversation(
    prompt: Any, response: Any, same: bool, source: SourceConfig, where: str
) -> tuple[list[dict[str, Any]], int]:
    try:
        return conversation_of(prompt, response, whole=same)
    except ValueError as error:
        found = f"{source.response_field} = {in_json(response)} ({error})"
        expected = "a list of messages with role and content, at least one of them with the role assistant"
        if same:
            expected += " and after another message: the field is prompt and response in one"
        raise UserError(where, found, expected if same else f"a text, or {expected}") from error


def tokenised(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Sequence[Piece]], ends: Ends, *, special: bool
) -> Responses:
    """The responses of several records as tokens. texts: `pieces_of` each. special: the tokenizer adds the tokens of a text
    that follows no template.

    A response's tokens begin where the prompt's end, as where the student writes it: no token spans the two.
    """
    grown = [list(accumulate(text for text, _ in pieces)) for pieces in texts]
    rows = iter(tokenizer(list(chain.from_iterable(grown)), add_special_tokens=special, verbose=False)["input_ids"])
    found: list[np.ndarray] = []
    trained: list[np.ndarray] = []
    for pieces in texts:
        so_far = list(next(rows))
        start = len(so_far)
        marks: list[bool] = []
        for number, (text, is_turn) in enumerate(pieces[1:], 1):
            longer = next(rows)
            # A tokenizer may join the end of one piece and the beginning of the next into one token.
            joined = longer[: len(so_far)] != so_far
            own = _alone(tokenizer, text) if joined else longer[len(so_far) :]
            own, written = _ended(list(own), is_turn, ends, last=number == len(pieces) - 1)
            so_far += own
            marks += [place < written for place in range(len(own))]
        found.append(np.array(so_far[start:], np.int32))
        trained.append(np.array(marks, bool))
    return Responses(
        tokens=np.concatenate([*found, np.zeros(0, np.int32)]),
        offsets=offsets_of(map(len, found)),
        trained=np.concatenate([*trained, np.zeros(0, bool)]),
    )


def _alone(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a text that goes on from another one. Some tokenizers write a space before every text."""
    spaced = text.startswith(" ") and tokenizer.tokenize("a")[0].startswith("▁")
    return list(tokenizer(text[1:] if spaced else text, add_special_tokens=False)["input_ids"])


def _ended(tokens: list[int], is_turn: bool, ends: Ends, *, last: bool) -> tuple[list[int], int]:
    """(the tokens of a piece, how many of them the assistant wrote): up to its stop token. What the template writes after that
    is context, and nothing at the end of a response, which gets a stop token where it has none."""
    if not is_turn:
        return tokens, 0
    stops = [place for place, token in enumerate(tokens) if token in ends.stop]
    if not stops:
        tokens = [*tokens, ends.written] if last else tokens
        return tokens, len(tokens)
    written = stops[-1] + 1
    return tokens[:written] if last else tokens, written


def odd_tokens(responses: Responses, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int]) -> dict[str, np.ndarray]:
    """Finds tokens that the student would be trained to write and that are probably a mistake in the data.

    Three kinds are found: the tokenizer's unknown token; a token of `stop` before the end of a turn, where generation would
    have stopped; and any other special token that some responses have and others do not. One that all responses have comes
    from the chat template. Returns the text of each token -> the indices [m] of the responses that hold it.
    """
    tokens, trained = responses.tokens, responses.trained
    of = np.repeat(np.arange(len(responses.offsets) - 1), np.diff(responses.offsets))
    is_last = trained.copy()
    is_last[:-1] &= ~trained[1:] | (of[1:] != of[:-1])
    unknown = tokenizer.unk_token_id
    added = [id_ for id_, token in tokenizer.added_tokens_decoder.items() if token.special]
    found = {}
    for token in np.unique(tokens[trained & np.isin(tokens, [*added, *tokenizer.all_special_ids, *stop])]).tolist():
        holds = np.unique(of[(tokens == token) & trained & ~(is_last & np.isin(tokens, stop))])
        if len(holds) and (token == unknown or token in stop or len(holds) < len(responses.offsets) - 1):
            found[str(tokenizer.convert_ids_to_tokens(token))] = holds
    return found
