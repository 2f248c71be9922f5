"""Aligns the tokens of two tokenizers on one text, by the bytes that they stand for. Pure functions.

The student and a teacher with another tokenizer cut the same bytes at different places. A *group* holds the tokens
between two neighbouring places where both cut: the student's tokens, and the teacher's tokens for the same bytes.

    student   | the | an | swer | is |          tokens
    teacher   | the | ans | wer | is |
    groups    |  0  |     1     |  2 |

The log-prob of a group is exact: the sum over the teacher's tokens in it. If the group has one token of the student,
this is the token's log-prob; if it has several, the sum is divided among them by a rule (`shares`). Comparing groups
instead of tokens that look alike is how GOLD (in TRL) merges tokens, and how rLLM scores again with another tokenizer.

Shapes: N tokens of the student, M of the teacher, G groups.
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
"""Texts that the pieces of their tokens must spell exactly; else the tokenizer is refused."""


@dataclass(frozen=True)
class Spelling:
    """The bytes that each token of a tokenizer stands for."""

    pieces: Sequence[bytes | None]
    """[V] bytes of each token. None: it stands for no text (special tokens, unused ids)."""
    special: Mapping[str, int]
    """Content -> id of the special tokens, without the unknown token."""
    strips_space: bool
    """The first token of a text may begin with a space that the text does not have (SentencePiece's dummy prefix)."""

    def bytes_of(self, tokens: Sequence[int]) -> list[bytes | None]:
        """The bytes of each token, where the tokens begin a text."""
        found = [self.pieces[token] if token < len(self.pieces) else None for token in tokens]
        if self.strips_space and found and found[0] is not None:
            found[0] = found[0].removeprefix(b" ")
        return found


def spelling_of(tokenizer: PreTrainedTokenizerBase, key: str) -> Spelling:
    """The bytes of every token, read from the tokenizer's own decoder.

    UserError, on `key`: a slow tokenizer, or one whose tokens are not pieces of the text (WordPiece, or a normaliser
    that changes PROBES).
    """
    if not tokenizer.is_fast:
        raise UserError(key, f"the slow tokenizer {type(tokenizer).__name__}", "a fast one (tokenizer.json)")
    # The decoder says how tokens become text. Its steps can be read only from its JSON form.
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
    unknown = tokenizer.unk_token_id  # it may stand for any text, so it has no counterpart in another tokenizer
    special = {token.content: id_ for id_, token in added.items() if token.special and id_ != unknown}
    spelling = Spelling(pieces, special, any(_strips(step) for step in steps))
    _check_spelling(spelling, tokenizer, key)
    return spelling


def byte_characters() -> dict[int, str]:
    """Byte -> the visible character that stands for it in vocabularies of byte-level BPE (GPT-2's table)."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [value for value in range(256) if value not in visible]
    return {value: chr(value) for value in visible} | {value: chr(256 + i) for i, value in enumerate(others)}


def _piece(token: str, steps: Sequence[Mapping[str, Any]]) -> bytes:
    """The bytes of a token, after the decoder steps that treat each token separately."""
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
    """UserError unless the tokens of each probe spell it, up to the first unknown character."""
    for text in PROBES:
        found = spelling.bytes_of(tokenizer(text, add_special_tokens=False)["input_ids"])
        known = found[: found.index(None)] if None in found else found  # up to an unknown token
        written = b"".join(piece for piece in known if piece is not None)
        if not text.encode().startswith(written) or (len(known) == len(found) and written != text.encode()):
            raise UserError(key, f"a tokenizer whose tokens of {text!r} are {written!r}", "tokens that spell the text")


def shared_groups(ours: Sequence[bytes], theirs: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray, bool]:
    """Groups of two tokenisations of a text, from the bytes of their tokens.

    Returns (group of each of our N tokens, group of each of their M tokens, whether both spell the same bytes). Groups
    are numbered from 0 in the order of the text, and each has tokens of both. Tokens after the last place where both
    cut have the group -1: from there on the bytes differ, or one of the two has ended.
    """
    text, other = b"".join(ours), b"".join(theirs)
    agree = next((i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))
    # A place in the text is an index of a byte, not of a character: byte-level tokens may cut a character in two.
    our_ends, their_ends = (np.cumsum([len(piece) for piece in pieces], dtype=np.int64) for pieces in (ours, theirs))
    shared = np.intersect1d(our_ends, their_ends)
    shared = shared[shared <= agree]

    def groups(ends: np.ndarray) -> np.ndarray:
        found = np.searchsorted(shared, ends)
        return np.where(found < len(shared), found, -1)

    return groups(our_ends), groups(their_ends), text == other


def shares(groups: np.ndarray, sums: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
    """Divides the teacher's log-prob of each group, sums [G], among the student's tokens in it: [N] float64, in nats.

    For token t of group g, with the student's own log-probs l [N] at sampling time:

        share_t = sums_g * l_t / sum_{u in g} l_u

    So the log-ratio l_t - share_t is l_t (1 - sums_g / sum_u l_u): all tokens of a group have log-ratios of one sign,
    and a token that the student was certain of (l_t = 0) gets 0. If the student was certain of all tokens of a
    group, the shares are equal. The shares of a group add up to its sum. NaN where `groups` [N] is -1.
    """
    # Rounding may give a log-prob just above 0, which would make a share negative.
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
    """Turns a student's tokens into a teacher's tokens for the same text."""

    ours: Spelling
    theirs: Spelling
    encode: Callable[[str], list[int]]
    """Text -> the teacher's tokens, none of them special."""
    end: int
    """The teacher's token that ends a response."""

    def read(self, tokens: Sequence[int], ended: bool, room: int) -> tuple[list[int], np.ndarray, np.ndarray]:
        """Reads one response: (the teacher's tokens [M], their groups [M], groups of the student's tokens [N]).

        ended: the last token is the stop token that ended the response. room: tokens that the teacher's context has
        left.

        Text between special tokens is tokenised by the teacher. A special token becomes the teacher's with the same
        content; the one that ended the response becomes `end`. Reading stops at bytes that are not UTF-8, a special
        token that the teacher lacks, a text that its tokenizer does not reproduce, or a full context. The student's
        tokens after the last complete group have group -1, and the teacher's tokens end with that group.
        """
        pieces = self.ours.bytes_of(tokens)
        read: list[int] = []
        groups, our_groups = np.zeros(0, np.int64), np.full(len(tokens), -1, np.int64)
        place, readable = 0, True
        while readable and place < len(tokens):
            first = place
            while place < len(tokens) and pieces[place] is not None:
                place += 1
            if place > first:
                found, theirs, ours, readable = self._read_text(
                    [piece for piece in pieces[first:place] if piece is not None]
                )
            else:
                place += 1
                last = ended and place == len(tokens)
                found, theirs, ours, readable = self._read_special(tokens[first], last)
            base = groups.max(initial=-1) + 1
            our_groups[first:place] = np.where(ours >= 0, ours + base, -1)
            groups = np.concatenate([groups, theirs + base])
            read += found
        # A full context may cut a group in two. Half a group has no exact log-prob, so the whole group goes.
        kept = groups[:room] if len(groups) <= room else groups[:room][groups[:room] < groups[room]]
        our_groups[our_groups > kept.max(initial=-1)] = -1
        return read[: len(kept)], kept, our_groups

    def _read_text(self, pieces: list[bytes]) -> tuple[list[int], np.ndarray, np.ndarray, bool]:
        """(the teacher's tokens up to the last group, their groups, the student's groups, whether all was read)."""
        written = b"".join(pieces)
        text = valid_prefix(written)
        found = self.encode(text)
        theirs = until_none(self.theirs.pieces[token] for token in found)  # an unknown token ends the reading
        if text.encode() != b"".join(theirs):  # SentencePiece may have put a space before the text
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


def make_reader(
    student: PreTrainedTokenizerBase,
    own: PreTrainedTokenizerBase,
    key: str,
    chat: bool,
    arguments: Mapping[str, Any] | None = None,
) -> Reader:
    """The reader for a teacher with the tokenizer `own`. chat: responses are answers in the teacher's chat template,
    with the arguments of the prompts.

    UserError, on the teacher's `key` or student.model: see `spelling_of`; or the teacher has no end token.
    """
    end = end_token_id(own, chat, arguments)
    if end is None:
        raise UserError(key, "no end-of-sequence token", "a tokenizer with one")

    def encode(text: str) -> list[int]:
        # Where the student writes `<eos>` in letters, the teacher must read letters, too.
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
    """The text up to the first byte that is not UTF-8, or that belongs to an incomplete character."""
    try:
        return written.decode()
    except UnicodeDecodeError as error:
        return written[: error.start].decode()
