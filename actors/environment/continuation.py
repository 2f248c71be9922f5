"""What follows the student's turn as token ids: the end of the turn, the environment's messages, and the next turn's opening.

The student's own ids are never tokenised again. A chat template is a program that writes a whole conversation, so what it writes
after a turn is found by rendering the conversation with a mark in the place of that turn. This is exact where the template only
appends: where it writes earlier turns otherwise once more messages follow (some drop the reasoning of earlier turns), a served
model would read another text than the one that was trained on. `difference` finds such templates.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from actors.data.messages import check_unicode, messages_of

Message = dict[str, Any]

ROLES = ("user", "tool", "system")
"""Roles of an environment's messages."""
CALL_ID = "call00000"
"""Id of a tool call where there is none: some templates demand one, of nine letters and digits."""
SHOWN = 60
"""Characters of a text that messages show."""
KEPT, LONGEST_KEPT = 1000, 256
"""Conversations whose closing is remembered; and what follows a turn, of so many tokens at most."""


@dataclass(frozen=True)
class Continuation:
    """The chat template of one student, as a writer of token ids."""

    tokenizer: Any
    stop_token_ids: frozenset[int]
    """Tokens that end the student's turn."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the chat template: `prompts.chat_template_arguments`."""
    _ends_of_last: dict[bytes, str] = field(default_factory=dict, init=False, repr=False, compare=False)
    _following: dict[bytes, list[int]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] | None = None) -> list[int]:
        """Token ids of an episode's first messages, and of the opening of the student's turn. ValueError: see `render`."""
        return self._ids(self.render(messages, tools))

    def least(self, messages: Sequence[Message]) -> int:
        """Tokens that these messages have at least. To count those of a text of many megabytes takes minutes and gigabytes."""
        return sum(len(message["content"]) for message in messages) // self._longest_token

    def after(
        self, first: Sequence[Message], new: Sequence[Message], last: int, tools: Sequence[Any] | None = None
    ) -> list[int]:
        """Token ids that follow the student's turn: what the template writes of its end, the new messages, and the next opening.

        first: the messages that the episode began with. last: the student's last token. The end of the turn is left out where the
        student has written it, or another special token that ends turns. ValueError: see `render`.
        """
        key = _digest([first, new, last, tools])  # environments repeat themselves, and a prompt's samples see the same
        if key in self._following:
            return self._following[key]
        found = self._after(first, new, last, tools)
        if len(found) <= LONGEST_KEPT:
            _keep(self._following, key, found)
        return found

    def _after(
        self, first: Sequence[Message], new: Sequence[Message], last: int, tools: Sequence[Any] | None
    ) -> list[int]:
        mark = _mark([*first, *new])
        written, turn = self._with_turn([*first], mark, [*new], tools)
        following = written.rpartition(mark)[2]
        # What is common to the turn as the last one and to the turn with messages after it is the end of the turn.
        closing = _common(following, self._closed(first, turn, mark, tools))
        return self._ids(following[self._end_of_turn(closing, last) :])

    def difference(
        self, first: Sequence[Message], new: Sequence[Message], tools: Sequence[Any] | None = None
    ) -> str | None:
        """What the template does to earlier turns when these messages follow, in words; None: it only appends.

        Two turns are tried, with reasoning too where the template or the opening of a turn knows of it.
        """
        try:
            opened = self.render(first, tools)
            texts = self._turns_to_try(opened)
            for text in texts:
                turn = {"role": "assistant", "content": text}
                try:
                    once = self.render([*first, turn, *new], tools)
                except (
                    ValueError
                ):  # demands a call before the results of tools: its text is not known, only that it follows
                    once, _ = self._with_turn([*first], _mark([*first, *new]), [*new], tools)
                    turn, text = {}, ""
                if found := _differs(opened, text, once):
                    return found
                if turn and (found := _differs(once, text, self.render([*first, turn, *new, turn, *new], tools))):
                    return found
        except ValueError as error:
            return str(error)
        return None

    def render(self, messages: Sequence[Message], tools: Sequence[Any] | None = None, *, opened: bool = True) -> str:
        """The text of a conversation. opened: with the opening of the student's next turn. ValueError: the template refuses it."""
        arguments = {**self.arguments, "add_generation_prompt": opened, "tokenize": False}
        if tools:
            arguments["tools"] = list(tools)
        try:
            return str(self.tokenizer.apply_chat_template(list(messages), **arguments))
        except Exception as error:  # whatever a template raises
            roles = ", ".join(message["role"] for message in messages)
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"the chat template refuses messages of {roles} ({reason})") from error

    def _with_turn(
        self, first: list[Message], mark: str, new: list[Message], tools: Sequence[Any] | None
    ) -> tuple[str, Message]:
        """(the conversation with the mark as the student's turn, that turn). ValueError: the template refuses it."""
        call = {"id": CALL_ID, "type": "function", "function": {"name": mark, "arguments": {}}}
        text: Message = {"role": "assistant", "content": mark}
        try:
            written = self.render([*first, text, *new], tools)
        except ValueError:
            if all(message["role"] != "tool" for message in new):
                raise
            text = {"role": "assistant", "content": "", "tool_calls": [call]}
            written = self.render([*first, text, *new], tools)
        if mark not in written:
            raise ValueError("the chat template leaves the student's turn out")
        return written, text

    def _closed(self, first: Sequence[Message], turn: Message, mark: str, tools: Sequence[Any] | None) -> str:
        """What the template writes after a turn that is the last one: the same after most of an episode's turns."""
        key = _digest([first, turn, tools])
        if key in self._ends_of_last:
            return self._ends_of_last[key]
        closed = self.render([*first, turn], tools, opened=False).rpartition(mark)[2]
        _keep(self._ends_of_last, key, closed)
        return closed

    @cached_property
    def _stop_texts(self) -> dict[int, str]:
        return {token: self.tokenizer.decode([token]) for token in self.stop_token_ids}

    @cached_property
    def _special(self) -> frozenset[int]:
        return frozenset(id_ for id_, token in self.tokenizer.added_tokens_decoder.items() if token.special)

    def _turns_to_try(self, opened: str) -> list[str]:
        """Texts of a turn: plain, and with reasoning where the template, or the opening that it has written, knows of it."""
        if opened.rstrip().endswith("<think>"):  # the student continues in it
            return ["…\n</think>\n\n…"]
        knows = "</think>" in str(self.tokenizer.chat_template) and not opened.rstrip().endswith("</think>")
        return ["…", *(["<think>\n…\n</think>\n\n…"] if knows else [])]

    def _end_of_turn(self, closing: str, last: int) -> int:
        """Where in the template's closing of a turn the student's own part of it ends."""
        if last not in self._stop_texts:
            return 0
        allowed = [
            text for token, text in self._stop_texts.items() if text and (token == last or last in self._special)
        ]
        found = [place + len(text) for text in allowed if (place := closing.find(text)) >= 0]
        return min(found, default=0)

    @cached_property
    def _longest_token(self) -> int:
        """Its characters, or its bytes where the vocabulary has those."""
        return max(map(len, self.tokenizer.get_vocab()))

    @cached_property
    def _plain(self) -> bool:
        """Whether the tokenizer's class tokenises a text as its backend does."""
        from transformers import PreTrainedTokenizerFast

        own = type(self.tokenizer)
        return issubclass(own, PreTrainedTokenizerFast) and all(
            getattr(own, name) is getattr(PreTrainedTokenizerFast, name) for name in ("__call__", "_encode_plus")
        )

    def _ids(self, text: str) -> list[int]:
        # A chat template writes the special tokens itself.
        if self._plain:
            backend = self.tokenizer.backend_tokenizer
            as_is = backend.padding is None and backend.truncation is None
            if as_is and backend.encode_special_tokens == self.tokenizer.split_special_tokens:
                # The wrapper gives even a single text to a pool of threads, which costs more than all else of a turn's text.
                return list(backend.encode(text, add_special_tokens=False).ids)
        return list(self.tokenizer(text, add_special_tokens=False, return_attention_mask=False)["input_ids"])


def checked(messages: Any, tool_calls: Sequence[Mapping[str, Any]] = (), *, first: bool = False) -> list[Message]:
    """An environment's messages as chat templates read them; a plain text is the user's. ValueError: what is wrong with them.

    tool_calls: those of the student's turn: results of tools that name no call get their ids, in order. first: they begin the
    episode, and may hold earlier turns.
    """
    found = messages_of(messages, continued=False)
    check_unicode(found)
    ids = itertools.chain((call["id"] for call in tool_calls), itertools.repeat(CALL_ID))
    for message in found:
        if message["role"] not in ROLES and not first:
            raise ValueError(f"a message of the role {message['role']!r}; an environment writes {', '.join(ROLES)}")
        if message["role"] == "tool" and "tool_call_id" not in message:
            message["tool_call_id"] = next(ids)
    return found


def _digest(value: Any) -> bytes | None:
    """A key for these messages, which no others have; None where they are not JSON, and nothing is kept."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return None
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _keep(kept: dict[bytes, Any], key: bytes | None, value: Any) -> None:
    if key is None:
        return
    if len(kept) >= KEPT:
        kept.clear()
    kept[key] = value


def _common(one: str, other: str) -> str:
    """The text that both begin with."""
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in same)]


def _mark(messages: Sequence[Message]) -> str:
    """A text that no message contains, and that templates neither strip nor change."""
    there = json.dumps(messages, ensure_ascii=False, default=str)
    return next(mark for number in itertools.count() if (mark := f"…{number}…") not in there)


def _differs(before: str, turn: str, found: str) -> str | None:
    """Where `found` does not begin with the text before a turn and the turn, in words.

    A space between the two is none of it: a tokenizer of words keeps it in the turn's first token.
    """
    if found.startswith(before) and found[len(before) :].lstrip(" ").startswith(turn):
        return None
    place = len(_common(before + turn, found))
    start = max(0, place - SHOWN // 3)
    was, now = (before + turn)[start : start + SHOWN], found[start : start + SHOWN]
    return f"once more messages follow, it writes {now!r} where the student has read or written {was!r}"
