"""Imports functions and classes by their import path in the configuration, `package.module:name`. Standard library only."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Collection
from inspect import Parameter
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


def check_call(
    function: Any,
    arguments: int,
    keywords: Collection[str],
    key: str,
    path: str,
    call: str,
    page: str = "docs/extending.md",
) -> None:
    """UserError unless `function` can be called with this many arguments and these keywords. Calls nothing.

    key: the configuration key that names `path`. call, page: how it will be called, and the page that says so, for the
    message.
    """
    try:
        inspect.signature(function).bind(*range(arguments), **dict.fromkeys(keywords))
    except TypeError as error:
        raise UserError(key, f"{path} ({error})", f"{call} ({page})") from error
    except ValueError:  # a function of C has no signature to look at
        return


def check_arguments(function: Any, given: Collection[str], key: str, path: str, page: str) -> None:
    """UserError unless `function` can be called with arguments of these names alone. Calls nothing.

    key: the configuration key that holds them. page: the page of the documentation that says what they are.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of C has no signature to look at
        return
    kinds = {name: one.kind for name, one in signature.parameters.items()}
    named = [name for name, kind in kinds.items() if kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    any_name = Parameter.VAR_KEYWORD in kinds.values()
    takes = f"arguments that {path} takes: {', '.join(named) or 'none'} ({page})"
    for name in given:
        if name not in named and not any_name:
            raise UserError(key, name, takes, named)
    try:
        signature.bind(**dict.fromkeys(given))
    except TypeError as error:
        raise UserError(key, f"{', '.join(given) or 'none'} ({error})", takes) from error
