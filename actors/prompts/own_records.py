"""Records that a function of the user's own yields (`prompts.function`).

A prompt is named by its number, and a campaign that is resumed reads its prompts again: every call must yield the same records.
So the function is called twice, and compared with itself, before anything else is done with them.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import xxhash

from actors.data.models import as_user_error
from actors.errors import UserError
from actors.import_path import check_arguments, import_object

MOST_RECORDS = 1_000_000
"""Records of a function without a limit; it might never end."""
END = object()
EXPECTED = "an iterator of records, dictionaries with names as keys"


def own_records(
    name: str, arguments: Mapping[str, Any], limit: int | None, key: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, record), and calls the function once more at the end.

    key: the source's configuration key. UserError: the function cannot be imported or called so, raises, yields what is no
    record, yields other records in the second call, or yields more than MOST_RECORDS and has no limit.
    """
    function = import_object(name, f"{key}.function", "a function")
    check_arguments(function, arguments, f"{key}.function_arguments", name, "docs/data.md")
    digests: list[int] = []
    for number, record in _records(function, name, arguments, limit, key):
        digests.append(_digest(record, name, number, key))
        yield number, record
    before = np.array(digests, np.uint64)
    del digests
    count = 0
    for number, record in _records(function, name, arguments, limit, key):
        if number > len(before) or _digest(record, name, number, key) != before[number - 1]:
            raise _not_repeatable(name, number, key)
        count = number
    if count != len(before):
        raise _not_repeatable(name, count + 1, key)


def _records(
    function: Any, name: str, arguments: Mapping[str, Any], limit: int | None, key: str
) -> Iterator[tuple[int, dict[str, Any]]]:
    with _call_errors(f"{key}.function", f"{name}, which failed", EXPECTED):
        returned = function(**arguments)
    if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__iter__"):
        raise UserError(f"{key}.function", f"{name}, which returned a {type(returned).__name__}", EXPECTED)
    with _call_errors(f"{key}.function", f"{name}, which failed", EXPECTED):
        records = iter(islice(returned, limit))
    number = 0
    while True:
        with _call_errors(f"{key}.function", f"{name}, which failed after {number} records", EXPECTED):
            record = next(records, END)
        if record is END:
            return
        number += 1
        if not isinstance(record, Mapping) or not all(isinstance(field, str) for field in record):
            found = f"{name}, whose record {number} is {str(record)[:60]!r}, a {type(record).__name__}"
            raise UserError(f"{key}.function", found, EXPECTED)
        if limit is None and number > MOST_RECORDS:
            found = f"null, and {name} yields more than {MOST_RECORDS:,} records"
            raise UserError(f"{key}.limit", found, "how many to read: it may never end")
        yield number, dict(record)


def _not_repeatable(name: str, number: int, key: str) -> UserError:
    found = f"{name}, whose record {number} is another in a second call"
    return UserError(f"{key}.function", found, "the same records in every call: draw them with a fixed seed")


def _digest(record: Mapping[str, Any], name: str, number: int, key: str) -> int:
    """UserError: a field holds what has no form in JSON, such as a tuple as a key or a list that holds itself."""
    digest = xxhash.xxh3_64()
    for field, value in record.items():
        with as_user_error(
            f"{key}.function", f"{name}, whose record {number} has the field {field!r}", "values that JSON can hold"
        ):
            digest.update(json.dumps([field, value], default=_plain).encode())
    return digest.intdigest()


@contextmanager
def _call_errors(key: str, what: str, expected: str) -> Iterator[None]:
    """As `as_user_error`, also for what is no Exception. An interrupt of the user's own, and a task's end, pass."""
    try:
        with as_user_error(key, what, expected):
            yield
    except (UserError, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError):
        raise
    except BaseException as error:
        raise UserError(key, f"{what} ({type(error).__name__}: {str(error)[:200]})", expected) from error


def _plain(value: Any) -> str:
    """Text of what JSON has no form for. One that would show an address in memory is left out."""
    return type(value).__name__ if type(value).__str__ is object.__str__ else str(value)
