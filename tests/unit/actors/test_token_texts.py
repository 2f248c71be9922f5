"""The text of each token: characters stay whole, and every token keeps its place."""

import random

import pytest

from actors.data.token_texts import INCOMPLETE, token_texts
from tests.tiny_tokenizers import TOKENIZERS

TEXTS = ["日本語", "日" * 40, "größer 🙂🙂😀, 日本 x", "The student  writes\n    def add", " a", ""]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_of_tokens_make_the_response_and_cut_no_character(name: str) -> None:
    tokenizer = TOKENIZERS[name]()
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == len(ids)
        assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        assert name == "characters" or INCOMPLETE not in "".join(texts)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokens_that_are_no_text_are_what_the_tokenizer_makes_of_them(name: str) -> None:
    tokenizer, draw = TOKENIZERS[name](), random.Random(0)
    for length in (1, 2, 5, 30, 200):
        ids = [draw.randrange(len(tokenizer)) for _ in range(length)]
        texts = token_texts(tokenizer, ids)
        assert len(texts) == length
        assert "".join(texts) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def test_a_token_keeps_its_place() -> None:
    tokenizer = TOKENIZERS["finer_byte_level"]()
    ids = tokenizer("a日b", add_special_tokens=False)["input_ids"]
    assert token_texts(tokenizer, ids) == ["a", *[""] * (len(ids) - 3), "日", "b"]
