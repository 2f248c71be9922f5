"""Imports functions and classes by their import path in the configuration, `package.module:name`. Standard library only."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable
from typing import Any

from actors.errors import UserError

_FORM = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_import_path(text: str) -> bool:
    """Whether `text` has the form `package.module:name`. Imports nothing."""
    return _FORM.fullmatch(text) is not None


def import_object(path: str, key: str, kind: str) -> Any:
    """Imports the object at `path`, `package.module:name`. It has to be callable: a function or a class.

    key: the configuration key that names it. kind: what it should be, for the message, for example "a class".
    UserError: another form, a module that cannot be imported (with the error that it raised), or no such object in it.
    """
    if not is_import_path(path):
        raise UserError(key, repr(path), f"the import path of {kind}, package.module:name")
    module_name, _, name = path.partition(":")
    # `python -m cluster` and Ray's workers look for modules in the working directory; the command `understudy` does not.
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (
        Exception,
        SystemExit,
    ) as error:  # a user's module may do anything when it is imported, also end the process
        reason = " ".join(str(error).strip().splitlines()[:2])[:200]
        raise UserError(key, f"{path} ({type(error).__name__}: {reason})", "a module that can be imported") from error
    found = getattr(module, name, None)
    if found is not None and not callable(found):
        raise UserError(key, f"{path}, which is of type {type(found).__name__}", kind)
    if found is None:
        others = [f"{module_name}:{other}" for other, value in vars(module).items() if callable(value)]
        raise UserError(key, path, f"{kind} in {getattr(module, '__file__', module_name)}", others)
    return found


def check_call(function: Any, arguments: int, keywords: Iterable[str], key: str, path: str, call: str) -> None:
    """UserError unless `function` can be called with this many arguments and these keywords. Calls nothing.

    key: the configuration key that names `path`. call: how it will be called, for the message.
    """
    try:
        inspect.signature(function).bind(*range(arguments), **dict.fromkeys(keywords))
    except TypeError as error:
        raise UserError(key, f"{path} ({error})", f"{call} (docs/extending.md)") from error
    except ValueError:  # a function of C has no signature to look at
        return
