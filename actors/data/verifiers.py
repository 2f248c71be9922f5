"""Verifiers: a response and its reference answer -> a reward, 1.0 for right and 0.0 for wrong.

A verifier is a pure function `verify(response: str, reference: str | None) -> float`: built-in, or
`package.module:function` of the user's own, which may also ask for the prompt and the record, be `async`, and return named
parts of the reward (docs/extending.md). The built-in ones need the standard library alone
(`math` also needs math-verify). A pattern, where there is one, is applied first: the verifier then gets what its last
match in the response captures (group 1, or the match).
"""

import asyncio
import inspect
import math
import re
from collections.abc import Callable, Coroutine, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from actors.config import VerifierConfig
from actors.data.models import as_user_error
from actors.errors import UserError
from actors.import_path import import_object

Verifier = Callable[..., float]
"""(response, reference, **aside) -> reward, any finite number; 1.0 for right and 0.0 for wrong, where accuracy is measured.

response: the text without special tokens. reference: the record's `reference_field`; None where a prompt has none. aside:
what of ASIDE the verifier asks for (`asks_for`).
UserError: a reference that is missing or that the verifier cannot use.
"""

ASIDE = ("prompt", "record")
"""Parameters that a function of the user's own may have besides: the prompt's text as the student reads it, and its record."""
MOST_PARTS = 32
"""Named parts of a reward: each is a metric."""


class Reward(float):
    """A reward, with its named parts besides."""

    parts: Mapping[str, float]


_DIGITS = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\d)\.\d+)(?:[eE][-+]?\d+)?"
# A sign belongs to the number unless something stands before it that it could subtract from: 10-5 ends in 5.
_NUMBER = re.compile(rf"((?:(?<![\w)\]}}])[-+])?{_DIGITS})(?:\s*/\s*({_DIGITS}))?")
_LATEX_FRACTION = re.compile(r"([-+]?)\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_LARGEST_EXPONENT = 10_000
LARGEST_REWARD = 1e6
"""A larger one is a mistake of the function; sums of such rewards would overflow."""


def make_verifier(config: VerifierConfig, key: str = "verifier") -> Verifier:
    """The verifier that `config` names. key: where the configuration stands, for errors.

    `exact`: the same text, but for white space at the ends; `regex`: the same after the pattern; `numeric`: the last
    numbers of both are equal (thousands separators, fractions and exponents understood); `math`: equal for
    math-verify, in the main thread only, since its time limit is a signal (judge.py gives it a process); `package.module:function`: called with
    (response, reference). UserError: no such name or function, a pattern that does not compile, a function that takes
    other arguments, or math-verify is not installed.
    """
    if config.name == "regex" and config.pattern is None:
        raise UserError(f"{key}.pattern", "null", "a regular expression, since the verifier is regex")
    try:
        pattern = re.compile(config.pattern) if config.pattern is not None else None
    except re.error as error:
        raise UserError(f"{key}.pattern", f"{config.pattern} ({error})", "a regular expression") from error
    score = _without_pattern(config.name, key)

    def verify(response: str, reference: str | None, **aside: Any) -> float:
        if pattern is None:
            return score(response, reference, **aside)
        captured = _captured(pattern, response)
        return 0.0 if captured is None else score(captured, reference, **aside)

    return verify


def make_async_verifier(
    config: VerifierConfig, key: str = "verifier"
) -> Callable[..., Coroutine[Any, Any, float]] | None:
    """The same as a coroutine, so that several responses can be judged at once; None: the function is no `async def`."""
    if config.name in BUILT_IN or ":" not in config.name:
        return None
    function, asked = import_object(config.name, f"{key}.name", "a function"), asks_for(config.name, key)
    if not inspect.iscoroutinefunction(function):
        return None
    pattern = re.compile(config.pattern) if config.pattern is not None else None
    places = _places(function, asked)

    async def verify(response: str, reference: str | None, **aside: Any) -> float:
        captured = response if pattern is None else _captured(pattern, response)
        if captured is None:
            return 0.0
        given = {"response": captured, "reference": reference}
        with as_user_error(f"{key}.name", f"{config.name}, which failed", "a reward for (response, reference)"):
            returned = await function(*(given[place] for place in places), **{one: aside.get(one) for one in asked})
        return _reward(returned, config.name, key)

    return verify


def _captured(pattern: re.Pattern[str], response: str) -> str | None:
    """What the last match captures: group 1, or the match. None: nothing matches."""
    matches = [match[1] if pattern.groups else match[0] for match in pattern.finditer(response)]
    return matches[-1] if matches else None


def asks_for(name: str, key: str) -> list[str]:
    """What of ASIDE a verifier has parameters for. UserError: it is a function of the user's own that cannot be imported."""
    if name in BUILT_IN or ":" not in name:
        return []
    try:
        parameters = inspect.signature(import_object(name, f"{key}.name", "a function")).parameters
    except ValueError:  # some functions written in C have no signature
        return []
    return [aside for aside in ASIDE if aside in parameters]


def trial(config: VerifierConfig, key: str = "verifier") -> Verifier:
    """The verifier with which references are tried before anything is spent: without the pattern.

    It is called with a reference as the response, too. UserError: what `make_verifier` and the verifier raise, for example
    a function of the user's own that fails; for `math` also a reference in which math-verify finds no expression.
    """
    make_verifier(config, key)
    return _try_math(key) if config.name == "math" else _without_pattern(config.name, key)


def tells_answers(config: VerifierConfig) -> bool:
    """Whether `answer_of` can say what a response answers: not for a function of the user's own without a pattern."""
    return config.name in BUILT_IN or config.pattern is not None


def answer_of(config: VerifierConfig, key: str = "verifier") -> Callable[[str], str | None]:
    """A function of a response that returns its answer, by which samples of a prompt vote; None: it has no answer.

    With a pattern, what its last match captures; for `numeric` the last number; for `math` the expression that math-verify
    finds; for `exact` the text. For other verifiers without a pattern, always None.
    """
    pattern = re.compile(config.pattern) if config.pattern is not None else None
    library = _math_verify(key) if config.name == "math" else None

    def answer(response: str) -> str | None:
        if pattern is not None:
            response = _captured(pattern, response) or ""
        if config.name == "numeric":
            found = last_number(response)
            return None if found is None else str(found)
        if library is not None and (parsed := library.parse(response)):
            return str(parsed[0])
        return (response.strip() or None) if tells_answers(config) else None

    return answer


def last_number(text: str) -> Fraction | None:
    """The last number in a text, exactly: "a total of $1,250.50." -> 2501/2, "3/4" -> 3/4. None where there is none."""
    text = _LATEX_FRACTION.sub(r" \1\2/\3 ", text.replace("\N{MINUS SIGN}", "-"))
    numbers = _NUMBER.findall(text)
    if not numbers:
        return None
    over, under = (Decimal(part.replace(",", "") or "1") for part in numbers[-1])
    # A degenerate response may write 1e999999999, whose exact value would not fit into memory.
    if not under or max(abs(over.adjusted()), abs(under.adjusted())) > _LARGEST_EXPONENT:
        return None
    return Fraction(over) / Fraction(under)


def _without_pattern(name: str, key: str) -> Verifier:
    if name in BUILT_IN:
        return BUILT_IN[name](key)
    if ":" in name:
        return _user_function(name, key)
    raise UserError(f"{key}.name", name, f"{', '.join(BUILT_IN)}, or package.module:function", BUILT_IN)


def _given(reference: str | None, key: str) -> str:
    if reference is None:
        raise UserError(
            key, "a prompt without a reference", "a reference answer to compare with (prompts.reference_field)"
        )
    return reference


def _exact(key: str) -> Verifier:
    return lambda response, reference, **_: float(response.strip() == _given(reference, key).strip())


def _numeric(key: str) -> Verifier:
    def verify(response: str, reference: str | None, **_: Any) -> float:
        wanted = last_number(_given(reference, key))
        if wanted is None:
            raise UserError(key, f"numeric, and the reference {reference!r}", "references with a number in them")
        return float(last_number(response) == wanted)

    return verify


def _math(key: str) -> Verifier:
    library = _math_verify(key)

    def verify(response: str, reference: str | None, **_: Any) -> float:
        gold = _given(reference, key)
        # math-verify finds nothing in some texts, for example a bare "x", which then would not equal itself.
        if response.strip() == gold.strip():
            return 1.0
        return float(library.verify(library.parse(_in_delimiters(gold)), library.parse(response)))

    return verify


def _try_math(key: str) -> Verifier:
    library = _math_verify(key)

    def attempt(_response: str, reference: str | None, **_: Any) -> float:
        # A text that is no expression comes back as itself, and could only equal itself.
        if all(isinstance(found, str) for found in library.parse(_in_delimiters(_given(reference, key)))):
            raise UserError(key, f"math, and the reference {reference!r}", "references with an expression in them")
        return 1.0

    return attempt


def _math_verify(key: str) -> Any:
    try:
        import math_verify
    except ImportError as error:
        raise UserError(f"{key}.name", "math", "math-verify installed: pip install understudy[math]") from error
    return math_verify


def _in_delimiters(gold: str) -> str:
    """Outside delimiters math-verify finds numbers and fractions only."""
    return gold if "$" in gold or "\\boxed" in gold else f"${gold}$"


def _user_function(name: str, key: str) -> Verifier:
    function, asked = import_object(name, f"{key}.name", "a function"), asks_for(name, key)
    # A function that names all four takes them by name, in any order; another gets response and reference by their places.
    places = _places(function, asked)
    try:
        inspect.signature(function).bind(*[""] * len(places), **dict.fromkeys(asked))
    except TypeError as error:
        expected = "a function of two strings, (response, reference), and of record and prompt if it names them"
        raise UserError(f"{key}.name", f"{name}{inspect.signature(function)}", expected) from error
    except ValueError:  # no signature; a wrong one then fails in the first call
        pass

    def verify(response: str, reference: str | None, **aside: Any) -> float:
        given = {"response": response, "reference": reference}
        with as_user_error(f"{key}.name", f"{name}, which failed", "a reward for (response, reference)"):
            returned = function(*(given[place] for place in places), **{one: aside.get(one) for one in asked})
            if inspect.isawaitable(returned):
                returned = asyncio.run(_awaited(returned))
        return _reward(returned, name, key)

    return verify


def _places(function: Any, asked: list[str]) -> list[str]:
    """What the function gets by its place: (response, reference); without the reference where it asks for more, and not for it."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError:
        return ["response", "reference"]
    fixed = [
        one.name
        for one in parameters
        if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) and one.name not in asked
    ]
    return ["response"] if asked and len(fixed) == 1 else ["response", "reference"]


async def _awaited(returned: Any) -> Any:
    return await returned


def _reward(returned: Any, name: str, key: str) -> float:
    """The reward that a function has returned: a number, or a mapping of "reward" and its parts to numbers."""
    values = dict(returned) if isinstance(returned, Mapping) else {"reward": returned}
    expected = f"a finite reward between -{LARGEST_REWARD:g} and {LARGEST_REWARD:g}"
    if "reward" not in values or len(values) > MOST_PARTS + 1:
        found = f"{name}, which returned {repr(returned)[:60]}"
        raise UserError(f"{key}.name", found, f"a mapping with 'reward' and at most {MOST_PARTS} parts")
    for part, value in values.items():
        try:
            # float("1") would accept a text, which is most likely a mistake in the function.
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST_REWARD or not re.fullmatch(r"\w{1,64}", str(part)):
            raise UserError(f"{key}.name", f"{name}, which returned {repr(returned)[:60]}", expected)
        values[part] = number
    reward = Reward(values.pop("reward"))
    reward.parts = values
    return reward


BUILT_IN: dict[str, Callable[[str], Verifier]] = {"exact": _exact, "regex": _exact, "numeric": _numeric, "math": _math}
