"""The text of each token of a response, for readers. A character that several tokens spell is whole: it belongs to the
token that completes it, and those before have the text "". Together the texts are the decoded response.
"""

from collections.abc import Sequence
from typing import Any

STRETCH = 24
"""Tokens that are decoded together, again for each of them."""
CONTEXT = 4
"""Tokens before a stretch that are decoded with it: a tokenizer may leave out a space at the start of a text."""
MOST_TOGETHER = 512
"""Tokens that may be decoded together where stretches give another text, which takes time in proportion to the square."""
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


def token_texts(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """N token ids -> N texts, special tokens included. Bytes that are no UTF-8 are U+FFFD, as in `tokenizer.decode`."""
    ids = list(tokens)
    texts: list[str] = []
    while len(texts) < len(ids):
        begin, end = len(texts), min(len(texts) + STRETCH, len(ids))
        while end < min(begin + 2 * STRETCH, len(ids)) and _decode(tokenizer, ids[begin:end]).endswith(INCOMPLETE):
            end += 1  # a character goes on in the next token
        texts += _stretch(tokenizer, ids[max(begin - CONTEXT, 0) : end], end - begin)
    if len(ids) > MOST_TOGETHER or "".join(texts) == _decode(tokenizer, ids):
        return texts
    return _stretch(tokenizer, ids, len(ids))  # a stretch has ended in the middle of bytes that are no text


def _stretch(tokenizer: Any, ids: list[int], count: int) -> list[str]:
    """The texts of the last `count` tokens: each adds what the text up to it has in common with the whole text."""
    first, whole = len(ids) - count, _decode(tokenizer, ids)
    texts, known = [], len(_decode(tokenizer, ids[:first]))
    for end in range(first + 1, len(ids) + 1):
        common = _in_common(whole, _decode(tokenizer, ids[:end])) if end < len(ids) else len(whole)
        texts.append(whole[known : max(known, common)])
        known = max(known, common)
    return texts


def _in_common(one: str, other: str) -> int:
    """Characters at the start that both texts have."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    # Without clean-up, which joins what belongs to different tokens ("do n't").
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)
