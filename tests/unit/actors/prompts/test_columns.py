"""Columns without a Python object for each row say what lists of Python objects would."""

from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from actors.prompts import columns
from actors.prompts.columns import Coded, Texts, many_rows
from actors.prompts.fingerprint import prompts_fingerprint
from actors.prompts.prompt_set import PromptSet
from actors.trajectory import offsets_of, ragged_rows

# With half a surrogate pair, which JSON may hold, and what looks like one in UTF-8.
TEXT = st.text(st.sampled_from("ab é€😀\ud800\udfff\ud7ff\0"), max_size=6)
TEXTS = st.lists(st.none() | TEXT, max_size=20)


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "ROWS", 4)


def old_fingerprint(tokens: np.ndarray, offsets: np.ndarray, references: list[Any], domains: list[Any]) -> str:
    """As checkpoints of earlier releases hold it, which had lists."""
    digest = xxhash.xxh3_128()
    digest.update(tokens.tobytes())
    digest.update(offsets.tobytes())
    for texts in (references, domains):
        for text in texts:
            digest.update(b"\0" if text is None else b"\1" + text.encode(errors="backslashreplace") + b"\0")
    return digest.hexdigest()


@given(TEXTS)
def test_texts_are_those_that_they_were_made_of(texts: list[str | None]) -> None:
    found = Texts.of(texts)
    assert found == texts and list(found) == texts and found[:] == texts and len(found) == len(texts)
    assert [found[row] for row in range(len(texts))] == texts == [found[row - len(texts)] for row in range(len(texts))]
    assert found != [*texts, "more"] and (not texts or found != [*texts[:-1], "other"])
    with pytest.raises(IndexError):
        found[len(texts)]
    rows = np.arange(0, len(texts), 2)
    assert found.take(rows) == found.picked(rows) == texts[::2]
    assert found.picked(np.arange(len(texts))) == texts
    assert [text is None for text in texts] == found.missing.tolist()
    again = Texts.of([*texts, *texts]).digests()
    assert np.array_equal(again[: len(texts)], again[len(texts) :])


@given(st.lists(st.none() | st.sampled_from(["a", "b", ""]), min_size=1, max_size=20))
def test_coded_values_are_those_that_they_were_made_of(values: list[str | None]) -> None:
    found = Coded.of(values)
    assert found == values and list(found) == values and found.values == list(dict.fromkeys(values))
    rows = np.arange(0, len(values), 3)
    few = found.take(rows)
    assert few == values[::3] and set(few.values) == set(values[::3])
    assert found.each(str) == list(map(str, values))
    assert found.where(lambda value: value == "a").tolist() == [value == "a" for value in values]


@given(TEXTS.filter(bool), st.data())
def test_a_fingerprint_is_that_of_earlier_releases(references: list[str | None], data: Any) -> None:
    count = len(references)
    domains = data.draw(st.lists(st.none() | st.sampled_from(["a", "\ud800"]), min_size=count, max_size=count))
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=count, max_size=count))
    offsets = offsets_of(lengths)
    tokens = np.arange(offsets[-1], dtype=np.int32)
    prompts = PromptSet(
        tokens=tokens,
        offsets=offsets,
        references=Texts.of(references),
        domains=Coded.of(domains),
        texts=Texts.of([""] * count),
    )
    assert prompts_fingerprint(prompts) == old_fingerprint(tokens, offsets, references, domains)
    begin = data.draw(st.integers(0, count - 1))
    own = tokens[offsets[begin] :]
    rest = old_fingerprint(own, offsets[begin:] - offsets[begin], references[begin:], domains[begin:])
    assert prompts_fingerprint(prompts, range(begin, count)) == rest


def test_many_rows_are_taken_as_few_are() -> None:
    offsets = offsets_of(np.arange(30) % 4)
    values = np.arange(offsets[-1], dtype=np.int32)
    rows = np.arange(0, 30, 2)
    assert np.array_equal(many_rows(values, offsets, rows), ragged_rows(values, offsets, rows))
    assert many_rows(values, offsets, rows).dtype == np.int32


def test_a_text_exists_only_when_it_is_asked_for() -> None:
    made: list[int] = []

    def text(number: int) -> str:
        made.append(number)
        return str(number)

    held = Texts.of(text(number) for number in range(100))
    assert made == list(range(100)) and type(held.data) is np.ndarray
    assert not any(isinstance(getattr(held, name), list | str) for name in Texts.__slots__)
