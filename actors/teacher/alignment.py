"""Two tokenizers on one text: which tokens of one and of the other spell the same bytes. Pure functions.

A response of the student is read by a teacher with a tokenizer of its own. Both cut the same bytes, at other places.
Between two places where both have cut lies a *group*: a few tokens of the student, and the teacher's tokens for the same
bytes. The log-prob of a group is exact, the sum of the teacher's tokens'. Where it holds one token of the student, so is
that token's; else the group's is shared out among them (`shares`). Groups are the smallest pieces that both can be asked
about; comparing them, rather than tokens that merely look alike, is the merging of GOLD (TRL) and of rLLM's re-scoring.
Shapes: N tokens of the student, M of the teacher.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.data.tokenizer import end_token_id
from actors.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("a b", "7 + 8 = 15\n", "def f(x):\n    return x", "é – 日本 🙂")
"""Texts whose tokens, put together, must be the text again."""


@dataclass(frozen=True)
class Spelling:
    """What the tokens of one tokenizer stand for."""

    pieces: Sequence[bytes | None]
    """[V] the bytes of each token. None: it stands for no text (special tokens, ids without a token)."""
    special: Mapping[str, int]
    """Content of the special tokens -> id, without the unknown token."""
    strips_space: bool
    """A text's first token may begin with a space that is not the text's (SentencePiece's dummy prefix)."""

    def bytes_of(self, tokens: Sequence[int]) -> list[bytes | None]:
        """The bytes of each token of a text, from its start."""
        found = [self.pieces[token] if token < len(self.pieces) else None for token in tokens]
        if self.strips_space and found and found[0] is not None:
            found[0] = found[0].removeprefix(b" ")
        return found


def spelling_of(tokenizer: PreTrainedTokenizerBase, key: str) -> Spelling:
    """The bytes of every token, from the tokenizer's own decoder.

    UserError, on `key`: a slow tokenizer, or one whose tokens are not pieces of the text (WordPiece, one that
    normalises away what PROBES hold).
    """
    if not tokenizer.is_fast:
        raise UserError(key, f"the slow tokenizer {type(tokenizer).__name__}", "a fast one (tokenizer.json)")
    backend = tokenizer.backend_tokenizer
    decoder = json.loads(backend.to_str())["decoder"] or {"type": "none"}
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = {step["type"] for step in steps}
    if not kinds & {"ByteLevel", "ByteFallback", "Metaspace", "Fuse"} or kinds & {"WordPiece", "BPEDecoder", "CTC"}:
        expected = "tokens that are pieces of the text, or of its bytes (ByteLevel, ByteFallback, Metaspace or Fuse)"
        raise UserError(key, f"a tokenizer whose decoder is {', '.join(sorted(kinds))}", expected)
    added = tokenizer.added_tokens_decoder
    pieces: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values()) + 1)
    to_byte = {character: value for value, character in byte_characters().items()}
    for token, id_ in tokenizer.get_vocab().items():
        if id_ in added:
            pieces[id_] = None if added[id_].special else added[id_].content.encode()
        elif "ByteLevel" in kinds:
            pieces[id_] = bytes(to_byte[c] for c in token) if all(c in to_byte for c in token) else token.encode()
        else:
            pieces[id_] = _piece(token, steps)
    unknown = tokenizer.unk_token_id  # it stands for what was not read, which another tokenizer cannot guess
    special = {token.content: id_ for id_, token in added.items() if token.special and id_ != unknown}
    spelling = Spelling(pieces, special, any(_strips(step) for step in steps))
    _check_spelling(spelling, tokenizer, key)
    return spelling


def byte_characters() -> dict[int, str]:
    """Byte -> the visible character that stands for it in the vocabularies of byte-level BPE (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in visible]
    return {value: chr(value) for value in visible} | {value: chr(256 + i) for i, value in enumerate(others)}


def _piece(token: str, steps: Sequence[Mapping[str, Any]]) -> bytes:
    """The bytes of a token, by those steps of a decoder that look at one token at a time."""
    for step in steps:
        if step["type"] == "ByteFallback" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        if step["type"] == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
        if step["type"] == "Metaspace":
            token = token.replace(step["replacement"], " ")
    return token.encode()


def _strips(step: Mapping[str, Any]) -> bool:
    metaspace = step["type"] == "Metaspace" and step.get("prepend_scheme", "always") != "never"
    return metaspace or (step["type"] == "Strip" and step["content"] == " " and step["start"] > 0)


def _check_spelling(spelling: Spelling, tokenizer: PreTrainedTokenizerBase, key: str) -> None:
    """UserError unless the tokens of each of PROBES are its bytes, as far as the tokenizer knows its characters."""
    for text in PROBES:
        found = spelling.bytes_of(tokenizer(text, add_special_tokens=False)["input_ids"])
        known = found[: found.index(None)] if None in found else found  # an unknown token: an alphabet without it
        written = b"".join(piece for piece in known if piece is not None)
        if not text.encode().startswith(written) or (len(known) == len(found) and written != text.encode()):
            raise UserError(key, f"a tokenizer whose tokens of {text!r} are {written!r}", "tokens that spell the text")


def shared_groups(ours: Sequence[bytes], theirs: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, bool]:
    """(group of each of our N tokens, of each of their M, whether they agree to the end) for the bytes of both.

    Groups count from 0, in order; they end where both have cut. -1: what comes after the last such place, since the
    bytes differ there, or one of the two ends early. A group has tokens of both.
    """
    text, other = b"".join(ours), b"".join(theirs)
    agree = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    our_ends, their_ends = (np.cumsum([len(piece) for piece in pieces], dtype=np.int64) for pieces in (ours, theirs))
    shared = np.intersect1d(our_ends, their_ends)
    shared = shared[shared <= agree]

    def groups(ends: np.ndarray) -> np.ndarray:
        found = np.searchsorted(shared, ends)
        return np.where(found < len(shared), found, -1)

    return groups(our_ends), groups(their_ends), text == other


def shares(groups: np.ndarray, sums: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """The sums [G] of the groups, shared out among the student's tokens [N] of each; NaN where `groups` [N] is -1.

    A token's share is in proportion to -logprobs [N], the student's own when it wrote the token: a token that it could
    not but write, after the one before, has no part in where the two differ, and all tokens of a group have a log-ratio
    of one sign. Where the student was certain of all of them, they share alike. The shares of a group add up to its sum,
    and one token has all of it.
    """
    surprise = np.where(np.isfinite(logprobs), -np.minimum(logprobs.astype(np.float64), 0), 0)
    inside = groups >= 0
    own = groups[inside]
    total = np.bincount(own, surprise[inside], len(sums))
    count = np.bincount(own, minlength=len(sums))
    certain = total[own] <= 0
    part = np.where(certain, 1 / count[own], surprise[inside] / np.where(certain, 1, total[own]))
    found = np.full(len(groups), np.nan)
    found[inside] = part * sums[own]
    return found


@dataclass(frozen=True)
class Reader:
    """How a teacher reads what a student wrote."""

    ours: Spelling
    theirs: Spelling
    encode: Callable[[str], list[int]]
    """A text -> the teacher's tokens, none of them special."""
    end: int
    """The teacher's token for the end of a response."""

    def read(self, tokens: Sequence[int], ended: bool, room: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """One response -> (the teacher's tokens [M], the group of each, the group of each of the student's [N]).

        ended: the last token is where the student stopped. room: tokens that the teacher can read. The text between
        special tokens is tokenised by the teacher; a special token becomes the teacher's of the same content, and one
        that ended the response becomes `end`. Reading stops where the teacher cannot follow: at bytes that are not
        UTF-8, a special token that it lacks, a text that its tokenizer does not give back, or a full context. What comes
        after the last group before that place has group -1, and is not read.
        """
        pieces = self.ours.bytes_of(tokens)
        read: list[int] = []
        groups, our_groups = np.zeros(0, np.int64), np.full(len(tokens), -1, np.int64)
        place, whole = 0, True
        while whole and place < len(tokens):
            first = place
            while place < len(tokens) and pieces[place] is not None:
                place += 1
            if place > first:
                found, theirs, ours, whole = self._read_text(
                    [piece for piece in pieces[first:place] if piece is not None]
                )
            else:
                place += 1
                last = ended and place == len(tokens)
                found, theirs, ours, whole = self._read_special(tokens[first], last)
            base = groups.max(initial=-1) + 1
            our_groups[first:place] = np.where(ours >= 0, ours + base, -1)
            groups = np.concatenate([groups, theirs + base])
            read += found
        kept = groups[:room] if len(groups) <= room else groups[:room][groups[:room] < groups[room]]
        our_groups[our_groups > kept.max(initial=-1)] = -1
        return read[: len(kept)], kept, our_groups

    def _read_text(self, pieces: list[bytes]) -> tuple[list[int], np.ndarray, np.ndarray, bool]:
        """(the teacher's tokens as far as groups go, their groups, ours, whether this is all of the text)."""
        written = b"".join(pieces)
        text = valid_prefix(written)
        found = self.encode(text)
        theirs = until_none(self.theirs.pieces[token] for token in found)  # an unknown token ends what is read
        if text.encode() != b"".join(theirs):  # perhaps SentencePiece has put its space before the text
            theirs = until_none(self.theirs.bytes_of(found))
        ours, groups, alike = shared_groups(pieces, theirs)
        inside = groups >= 0
        return [token for token, keep in zip(found, inside, strict=False) if keep], groups[inside], ours, alike

    def _read_special(self, token: int, last: bool) -> tuple[list[int], np.ndarray, np.ndarray, bool]:
        content = next((content for content, id_ in self.ours.special.items() if id_ == token), "")
        found = self.end if last else self.theirs.special.get(content)
        if found is None:
            return [], np.zeros(0, np.int64), np.array([-1]), False
        return [found], np.array([0]), np.array([0]), True


def make_reader(student: PreTrainedTokenizerBase, own: PreTrainedTokenizerBase, key: str, chat: bool) -> Reader:
    """How a teacher with the tokenizer `own` reads what a student writes; chat: as answers of its chat template.

    UserError, on the teacher's `key` or student.model: as spelling_of, or no token ends a text.
    """
    end = end_token_id(own, chat)
    if end is None:
        raise UserError(key, "no end-of-sequence token", "a tokenizer with one")

    def encode(text: str) -> list[int]:
        # What the student spells out in letters is no special token of the teacher's.
        return list(own(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"])

    return Reader(spelling_of(student, "student.model"), spelling_of(own, key), encode, end)


def until_none(pieces: Iterable[bytes | None]) -> list[bytes]:
    """The pieces up to the first that is None."""
    found = []
    for piece in pieces:
        if piece is None:
            break
        found.append(piece)
    return found


def valid_prefix(written: bytes) -> str:
    """The text up to the first byte that is not UTF-8, or belongs to a character that is cut off."""
    try:
        return written.decode()
    except UnicodeDecodeError as error:
        return written[: error.start].decode()
