"""Reads the answers of a teacher's servers. Pure functions; a ValueError is an answer that cannot be used.

A server may send anything: another number of tokens, strings in place of numbers, the same number for every token. What is
missing becomes NaN; what shows that the server does not do its work is a ValueError, and the server counts as failing.
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

ALIKE, ALL_ZERO = 8, 3
"""As many known tokens, all with one and the same log-prob, or all with 0, are no answer of a language model."""
ENTRY_BYTES = 600
"""Most bytes of one token and its log-prob in an answer: a token may be spelled, with each byte escaped."""


def decoded(content: bytes) -> dict[str, Any]:
    """The JSON object of an answer that has choices. ValueError: anything else."""
    try:
        answer = json.loads(content)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except ValueError:
        raise ValueError(f"an answer that is no JSON: {content[:60]!r}") from None
    if not isinstance(answer, dict):
        raise ValueError(f"a JSON {type(answer).__name__} as an answer")
    if not answer.get("choices") and answer.get("error"):
        raise ValueError(f"an error in an answer: {str(answer['error'])[:100]}")
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("an answer without choices")
    return answer


def most_bytes(tokens: int, count: int) -> int:
    """Bytes that an answer about `tokens` tokens, with `count` likeliest tokens each, may have."""
    return (1 << 20) + ENTRY_BYTES * (tokens + 1) * (count + 2)


def scores(
    answer: dict[str, Any], text: Sequence[int], length: int, count: int, *, echo: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(log-probs, token ids), [length, 1 + count] each, for the last `length` tokens of the text.

    Column 0 is the token of the text, the others are the likeliest tokens there. NaN: the server sent no log-prob, or
    one that is no number. ValueError: see the module.
    """
    logprobs, ids = np.full((length, 1 + count), np.nan, np.float32), np.zeros((length, 1 + count), np.int32)
    places = _echoed(answer["choices"][0]) if echo else _prompt_logprobs(answer)
    if len(places) > len(text) + 1:
        raise ValueError(f"log-probs of {len(places)} tokens, for a text of {len(text)}")
    own = [place[token] for place, token in zip(places, text, strict=False) if token in place]
    if len(set(own)) == 1 and len(own) >= (ALL_ZERO if own[0] == 0 else ALIKE):
        raise ValueError(f"the same log-prob, {own[0]:g}, for every token")
    for row, place in enumerate(range(len(text) - length, min(len(text), len(places)))):
        here = places[place]
        # Servers list the text's own token, too, so there may be K + 1: the sort drops one that is not among the K.
        likeliest = sorted(here.items(), key=lambda pair: -pair[1])[:count]
        logprobs[row, 0] = here.get(text[place], np.nan)
        for column, (token, value) in enumerate(likeliest, 1):
            ids[row, column], logprobs[row, column] = token, value
    return logprobs, ids


def written_tokens(answer: dict[str, Any], most: int) -> np.ndarray:
    """[N] int32 the tokens of a generated text. ValueError: the server does not say them as ids, or says more than `most`."""
    found = answer["choices"][0].get("logprobs")
    tokens = found.get("tokens") if isinstance(found, dict) else None
    if not isinstance(tokens, list):
        raise ValueError("a generated text without its tokens")
    ids = [_token_id(token) for token in tokens]
    if None in ids:
        raise ValueError("a generated token that is no id")
    if len(ids) > most:
        raise ValueError(f"a generated text of {len(ids)} tokens, where at most {most} were asked for")
    if any(token >= 2**31 for token in ids if token is not None):
        raise ValueError("a generated token that is no id below 2^31")
    return np.array(ids, np.int32)


def _prompt_logprobs(answer: dict[str, Any]) -> list[dict[int, float]]:
    """For each token of the text: token id -> log-prob, from vLLM's `prompt_logprobs`."""
    listed = answer["choices"][0].get("prompt_logprobs") or answer.get("prompt_logprobs") or []
    if not isinstance(listed, list):
        raise ValueError("log-probs that are no list")
    return [
        _known(
            (int(token), entry.get("logprob") if isinstance(entry, dict) else None)
            for token, entry in place.items()
            if token.isascii() and token.isdigit()
        )
        if isinstance(place, dict)
        else {}
        for place in listed
    ]


def _echoed(choice: dict[str, Any]) -> list[dict[int, float]]:
    """For each token of the text: token id -> log-prob, from the `logprobs` of an echoed prompt."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return []
    tokens, values, tops = (found.get(name) for name in ("tokens", "token_logprobs", "top_logprobs"))
    if not isinstance(tokens, list) or not isinstance(values, list):
        return []
    tops = tops if isinstance(tops, list) else [None] * len(tokens)
    return [
        _known(
            [*((_token_id(t), v) for t, v in (top if isinstance(top, dict) else {}).items()), (_token_id(token), value)]
        )
        for token, value, top in zip(tokens, values, tops, strict=False)
    ]


def _known(pairs: Any) -> dict[int, float]:
    """The pairs whose token is an id that fits int32, and whose log-prob is a number."""
    return {
        token: float(value)
        for token, value in pairs
        if token is not None
        and token < 2**31
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < 1e30
        and not math.isnan(value)
    }


def _token_id(token: object) -> int | None:
    """`token_id:123` -> 123; None for a token that the server writes as text."""
    name, _, number = token.partition(":") if isinstance(token, str) else ("", "", "")
    return int(number) if name == "token_id" and number.isascii() and number.isdigit() and len(number) < 12 else None
