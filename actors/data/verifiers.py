"""Verifiers: a response and its reference answer -> a reward, 1.0 for right and 0.0 for wrong.

Pure functions of two strings, on the standard library alone (`math` also needs math-verify). A pattern, where there is
one, comes first: what its last match captures in the response (group 1, or all of it) is what is compared.
"""

import importlib
import math
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from actors.config import VerifierConfig
from actors.data.models import as_user_error
from actors.errors import UserError

Verifier = Callable[[str, str | None], float]
"""(response, reference) -> reward. UserError: a reference that is missing or that the verifier cannot use."""

_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+)?"
# A sign belongs to the number unless something stands before it that it could subtract from: 10-5 ends in 5.
_NUMBER = re.compile(rf"((?:(?<![\w)\]}}])[-+])?{_DIGITS})(?:\s*/\s*({_DIGITS}))?")
_LATEX_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LARGEST_EXPONENT = 10_000


def make_verifier(config: VerifierConfig, key: str = "verifier") -> Verifier:
    """The verifier that `config` names. key: where the configuration stands.

    `exact`: the same text, but for white space at the ends; `regex`: the same after the pattern; `numeric`: the last
    numbers of both are equal (thousands separators, fractions and exponents understood); `math`: equal for
    math-verify, in the main thread only, since its time limit is a signal; `package.module:function`: called with
    (response, reference). UserError: a name, pattern or function that is not there, and the extra to install for `math`.
    """
    if config.name == "regex" and config.pattern is None:
        raise UserError(f"{key}.pattern", "null", "a regular expression, since the verifier is regex")
    try:
        pattern = re.compile(config.pattern) if config.pattern is not None else None
    except re.error as error:
        raise UserError(f"{key}.pattern", f"{config.pattern} ({error})", "a regular expression") from error
    if config.name in _BUILT_IN:
        score = _BUILT_IN[config.name](key)
    elif ":" in config.name:
        score = _user_function(config.name, key)
    else:
        expected = f"{', '.join(_BUILT_IN)}, or package.module:function"
        raise UserError(f"{key}.name", config.name, expected, _BUILT_IN)

    def verify(response: str, reference: str | None) -> float:
        if pattern is None:
            return score(response, reference)
        matches = [match[1] if pattern.groups else match[0] for match in pattern.finditer(response)]
        return score(matches[-1], reference) if matches and matches[-1] is not None else 0.0

    return verify


def rewards_of(
    tokenizer: Any, verifier: Verifier, tokens: np.ndarray, offsets: np.ndarray, references: Sequence[str | None]
) -> np.ndarray:
    """[B] float64 rewards of B responses (tokens [N], offsets [B + 1]) without their special tokens."""
    texts = tokenizer.batch_decode(np.split(tokens, offsets[1:-1]), skip_special_tokens=True)
    return np.array([verifier(*pair) for pair in zip(texts, references, strict=True)])


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly: "a total of $1,250.50." -> 2501/2, "3/4" -> 3/4. None where there is none."""
    text = _LATEX_FRACTION.sub(r" \1\2/\3 ", text.replace("\N{MINUS SIGN}", "-"))
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    over, under = (Decimal(part.replace(",", "") or "1") for part in numbers[-1])
    # A degenerate response may write 1e999999999, whose exact value would fill the memory.
    if not under or max(abs(over.adjusted()), abs(under.adjusted())) > _LARGEST_EXPONENT:
        return None
    return Fraction(over) / Fraction(under)


def _given(reference: str | None, key: str) -> str:
    if reference is None:
        raise UserError(
            key, "a prompt without a reference", "a reference answer to compare with (prompts.reference_field)"
        )
    return reference


def _exact(key: str) -> Verifier:
    return lambda response, reference: float(response.strip() == _given(reference, key).strip())


def _numeric(key: str) -> Verifier:
    def verify(response: str, reference: str | None) -> float:
        wanted = last_number(_given(reference, key))
        if wanted is None:
            raise UserError(key, f"numeric, and the reference {reference!r}", "references with a number in them")
        return float(last_number(response) == wanted)

    return verify


def _math(key: str) -> Verifier:
    try:
        import math_verify
    except ImportError as error:
        raise UserError(f"{key}.name", "math", "math-verify installed: pip install understudy[math]") from error

    def verify(response: str, reference: str | None) -> float:
        gold = _given(reference, key)
        if response.strip() == gold.strip():
            return 1.0
        if "$" not in gold and "\\boxed" not in gold:
            gold = f"${gold}$"
        return float(math_verify.verify(math_verify.parse(gold), math_verify.parse(response)))

    return verify


def _user_function(name: str, key: str) -> Verifier:
    module_name, _, attribute = name.partition(":")
    with as_user_error(f"{key}.name", name, "a module that can be imported from here"):
        module = importlib.import_module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        functions = [f"{module_name}:{name}" for name, value in vars(module).items() if callable(value)]
        raise UserError(f"{key}.name", name, f"a function of {module.__file__}", functions)

    def verify(response: str, reference: str | None) -> float:
        with as_user_error(f"{key}.name", f"{name}, which failed", "a reward for (response, reference)"):
            reward = float(function(response, reference))
        if not math.isfinite(reward):
            raise UserError(f"{key}.name", f"{name}, which returned {reward}", "a finite reward")
        return reward

    return verify


_BUILT_IN: dict[str, Callable[[str], Verifier]] = {"exact": _exact, "regex": _exact, "numeric": _numeric, "math": _math}
