"""Alignment against what the tokenizers decode, and against a search over all pairs of prefixes."""

from functools import cache
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from actors.data.tokenizer import end_token_id
from actors.errors import UserError
from actors.teacher.alignment import Reader, Spelling, make_reader, shared_groups, shares, spelling_of, valid_prefix
from tests.tiny_tokenizers import CORPUS, TOKENIZERS

NAMES = [*TOKENIZERS, "demo"]
PAIRS = [(ours, theirs) for ours in NAMES for theirs in NAMES]
PLENTY = 10**6
TEXTS = st.one_of(
    st.text(max_size=40), st.lists(st.sampled_from([w for line in CORPUS for w in line.split(" ")])).map(" ".join)
)


@cache
def tokenizer_of(name: str) -> Any:
    return AutoTokenizer.from_pretrained("examples/addition/student") if name == "demo" else TOKENIZERS[name]()


@cache
def reader(ours: str, theirs: str) -> Reader:
    return make_reader(tokenizer_of(ours), tokenizer_of(theirs), "key", True)


def text_of(name: str, tokens: list[int]) -> str:
    return tokenizer_of(name).decode(tokens, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_tokens_up_to_the_end_of_each_group_decode_to_the_same_text(ours: str, theirs: str, text: str) -> None:
    tokens = tokenizer_of(ours)(text, add_special_tokens=False)["input_ids"]
    read, groups, our_groups = reader(ours, theirs).read(tokens, False, PLENTY)
    assert len(read) == len(groups) and sorted(set(groups.tolist())) == sorted(set(our_groups.tolist()) - {-1})
    assert (np.diff(groups) >= 0).all() and (np.diff(our_groups[our_groups >= 0]) >= 0).all()
    for group in set(groups.tolist()):
        written = text_of(ours, [t for t, g in zip(tokens, our_groups, strict=True) if 0 <= g <= group])
        told = text_of(theirs, [t for t, g in zip(read, groups, strict=True) if g <= group])
        if "�" not in written + told:  # the end of a group may lie within a character, which no tokenizer decodes
            assert written == told
    if our_groups.size and (our_groups >= 0).all() and "�" not in text:
        assert text_of(theirs, read) == text_of(ours, tokens)


@pytest.mark.parametrize(("ours", "theirs"), [p for p in PAIRS if not {"characters", "demo"} & set(p)])
@settings(max_examples=40, deadline=None)
@given(text=TEXTS)
def test_between_tokenizers_of_all_texts_every_token_has_a_group(ours: str, theirs: str, text: str) -> None:
    tokenizer = tokenizer_of(ours)
    assume(not any(token in text for token in tokenizer.get_added_vocab()))
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assume(any(reader(ours, theirs).ours.bytes_of(tokens)))
    read, _, our_groups = reader(ours, theirs).read(tokens, False, PLENTY)
    assert (our_groups >= 0).all() and text_of(theirs, read) == text_of(ours, tokens)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
def test_the_same_tokenizer_gives_each_token_a_group_of_its_own(name: str, text: str) -> None:
    unknown = tokenizer_of(name).unk_token_id
    tokens = tokenizer_of(name)(text, add_special_tokens=False)["input_ids"]
    tokens = tokens[: tokens.index(unknown)] if unknown in tokens else tokens
    read, groups, our_groups = reader(name, name).read(tokens, False, PLENTY)
    if name == "sentencepiece":  # its first token may be the empty one
        assert (our_groups >= 0).all()
        return
    assert read == tokens and groups.tolist() == our_groups.tolist() == list(range(len(tokens)))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_whatever_a_student_writes_is_read_as_far_as_it_can_be(ours: str, theirs: str, data: Any) -> None:
    """Any ids at all: broken characters, special tokens in the middle, rows of padding without a token."""
    whole = reader(ours, theirs)
    tokens = data.draw(st.lists(st.integers(0, len(whole.ours.pieces) + 3), max_size=30))
    read, groups, our_groups = whole.read(tokens, False, PLENTY)
    pieces, known = whole.ours.bytes_of(tokens), whole.theirs.pieces
    for group in set(groups.tolist()):
        wrote = [pieces[i] for i in np.flatnonzero(our_groups == group)]
        told = [known[token] for token in np.array(read)[groups == group].tolist()]
        if None in wrote:
            assert wrote == told == [None]  # a special token that both have
        else:
            assert b"".join(wrote).strip() == b"".join(told).strip()
    scored = our_groups >= 0
    assert not (np.diff(scored.astype(int)) > 0).any(), "after what cannot be read, nothing is"
    readable = b"".join(piece for piece in pieces if piece is not None)
    if None not in pieces and "\N{REPLACEMENT CHARACTER}" in readable.decode(errors="replace"):
        assert sum(map(len, (p for p, s in zip(pieces, scored, strict=True) if s and p))) <= len(
            valid_prefix(readable).encode()
        )


@settings(max_examples=300, deadline=None)
@given(
    ours=st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"ba"]), max_size=7),
    theirs=st.lists(st.sampled_from([b"", b"a", b"b", b"ab", b"ba"]), max_size=7),
)
def test_groups_end_just_where_a_prefix_of_one_is_a_prefix_of_the_other(ours: list[bytes], theirs: list[bytes]) -> None:
    first, second = (list(accumulate(pieces)) for pieces in (ours, theirs))
    ends = sorted({len(text) for text in first if text in second})  # a search over all pairs
    our_groups, their_groups, alike = shared_groups(ours, theirs)
    assert alike == (b"".join(ours) == b"".join(theirs))
    for found, prefixes in ((our_groups, first), (their_groups, second)):
        wanted = [next((g for g, end in enumerate(ends) if len(text) <= end), -1) for text in prefixes]
        assert found.tolist() == wanted


def test_a_character_that_is_split_over_tokens_is_one_group() -> None:
    """🙂 is F0 9F 99 82: three tokens of the finer tokenizer, one of the other, with the space before it."""
    finer = tokenizer_of("finer_byte_level")("é 🙂x", add_special_tokens=False)["input_ids"]
    whole = reader("finer_byte_level", "sentencepiece")
    assert whole.ours.bytes_of(finer) == [b"\xc3", b"\xa9", b" ", b"\xf0\x9f", b"\x99", b"\x82", b"x"]
    assert whole.read(finer, False, PLENTY)[2].tolist() == [0, 1, 2, 3, 3, 3, 4]


def test_a_character_cut_off_by_the_length_limit_has_no_score() -> None:
    finer = tokenizer_of("finer_byte_level")("x🙂", add_special_tokens=False)["input_ids"]
    for theirs in ("byte_level", "sentencepiece", "finer_byte_level"):
        _, _, groups = reader("finer_byte_level", theirs).read(finer[:-1], False, PLENTY)
        assert groups.tolist() == [0, -1, -1]


def test_the_end_of_a_response_is_the_teachers_own() -> None:
    whole, student = reader("characters", "byte_level"), tokenizer_of("characters")
    tokens = student("the<eos>", add_special_tokens=False)["input_ids"]
    read, groups, our_groups = whole.read(tokens, True, PLENTY)
    assert read[-1] == tokenizer_of("byte_level").convert_tokens_to_ids("<|end|>")
    assert our_groups[-1] == groups[-1] == our_groups[-2] + 1
    # Cut at the length limit, a special token that the teacher lacks is nothing it could read.
    assert whole.read(tokens, False, PLENTY)[2].tolist()[-1] == -1


def test_special_tokens_are_those_of_the_same_content_and_what_the_teacher_lacks_ends_the_reading() -> None:
    student, whole = tokenizer_of("byte_level"), reader("byte_level", "finer_byte_level")
    tokens = student("a<|tool|>b<|end|>c", add_special_tokens=False)["input_ids"]
    read, _, groups = whole.read(tokens, False, PLENTY)
    assert groups.tolist() == [0, 1, 2, -1, -1]
    assert tokenizer_of("finer_byte_level").convert_ids_to_tokens(read) == ["a", "<|tool|>", "b"]


def test_letters_that_spell_a_special_token_are_letters_to_the_teacher() -> None:
    tokens = tokenizer_of("characters")("a<|end|>", add_special_tokens=False)["input_ids"]
    read, _, groups = reader("characters", "byte_level").read(tokens, False, PLENTY)
    own = tokenizer_of("byte_level")
    assert (groups >= 0).all() and own.eos_token_id not in read and own.decode(read) == "a<|end|>"


@pytest.mark.parametrize("room", range(12))
def test_a_full_context_ends_at_a_group_and_the_rest_has_no_score(room: int) -> None:
    tokens = tokenizer_of("sentencepiece")("the 🙂 answer é", add_special_tokens=False)["input_ids"]
    whole = reader("sentencepiece", "finer_byte_level")
    read, groups, our_groups = whole.read(tokens, False, PLENTY)
    cut, its_groups, our_cut = whole.read(tokens, False, room)
    assert len(cut) <= room and cut == read[: len(cut)] and its_groups.tolist() == groups[: len(cut)].tolist()
    complete = {g for g in set(groups.tolist()) if np.flatnonzero(groups == g).max() < room}
    assert set(its_groups.tolist()) == complete
    assert our_cut.tolist() == [g if g in complete else -1 for g in our_groups]


FINITE = st.floats(-30, 0, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.lists(FINITE, min_size=1, max_size=4), st.floats(-50, 0)), max_size=6))
def test_the_shares_of_a_group_add_up_to_its_sum_and_are_log_probs(groups: list[tuple[list[float], float]]) -> None:
    member = np.repeat(np.arange(len(groups)), [len(own) for own, _ in groups]).astype(int)
    own = np.array([value for values, _ in groups for value in values], np.float32)
    sums = np.array([total for _, total in groups])
    found = shares(member, sums, own)
    assert (found <= 0).all()
    for group, (values, total) in enumerate(groups):
        assert found[member == group].sum() == pytest.approx(total, abs=1e-9)
        difference = own[member == group] - found[member == group]
        assert (difference >= -1e-5).all() or (difference <= 1e-5).all() or sum(values) == 0
        if len(values) == 1:
            assert found[member == group][0] == total  # to the bit


def test_shares_are_in_proportion_to_the_students_surprise_and_equal_where_it_had_none() -> None:
    groups, sums = np.array([0, 0, 1, 1, 2, -1]), np.array([-6.0, -4.0, np.nan])
    found = shares(groups, sums, np.array([-1, -2, 0, 0, -1, -1], np.float32))
    assert found[:4].tolist() == [-2, -4, -2, -2] and np.isnan(found[4:]).all()


def test_a_tokenizer_whose_tokens_are_no_pieces_of_text_is_refused() -> None:
    wordpiece = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    wordpiece.decoder = decoders.WordPiece()
    spaced = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    spaced.pre_tokenizer = pre_tokenizers.Whitespace()
    lossy = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<unk>": 2}, unk_token="<unk>"))
    lossy.pre_tokenizer, lossy.decoder = pre_tokenizers.Whitespace(), decoders.Fuse()
    for backend, reason in ((wordpiece, "decoder is WordPiece"), (spaced, "decoder is none"), (lossy, "are b'ab'")):
        with pytest.raises(UserError, match=rf"^teachers\.a\.tokenizer: found .*{reason}"):
            spelling_of(PreTrainedTokenizerFast(tokenizer_object=backend), "teachers.a.tokenizer")


def test_a_response_ends_as_the_chat_template_says_or_with_the_end_of_a_text() -> None:
    tokenizer = tokenizer_of("byte_level")
    end, tool = tokenizer.convert_tokens_to_ids(["<|end|>", "<|tool|>"])
    assert end_token_id(tokenizer, True) == end_token_id(tokenizer, False) == end
    with pytest.raises(UserError, match="no end-of-sequence token"):
        other = TOKENIZERS["byte_level"]()
        other.eos_token = None
        make_reader(tokenizer, other, "key", False)
    other = TOKENIZERS["byte_level"]()
    other.chat_template = other.chat_template.replace("<|end|>", " <|tool|>")
    assert end_token_id(other, True) == tool and end_token_id(other, False) == end


def test_padding_and_unknown_ids_stand_for_no_text() -> None:
    assert Spelling([b"a", None], {}, False).bytes_of([0, 1, 2]) == [b"a", None, None]
