"""Text that is safe to print and to record: without control sequences, and without secrets. Standard library only."""

import os
import re

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Control characters but for line feed and tab, and those that turn the direction of a line."""
_SECRET = re.compile(r"KEY|TOKEN|SECRET|PASS|CREDENTIAL|AUTH|URL|URI", re.IGNORECASE)
SHORTEST_SECRET = 4
_secrets: dict[str, str] = {}
"""Value of an environment variable that a configuration refers to -> the reference."""


def printable(text: str) -> str:
    """The text with an escape, such as `\\x1b`, in place of each character that a terminal would obey."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def conceal(variable: str) -> None:
    """From now on `concealed` hides the value of this environment variable, if its name is that of a secret."""
    value = os.environ.get(variable, "")
    if _SECRET.search(variable) and len(value) >= SHORTEST_SECRET:
        _secrets[value] = f"${{oc.env:{variable}}}"


def concealed(text: str) -> str:
    """The text with the reference in place of each secret."""
    for value, reference in _secrets.items():
        text = text.replace(value, reference)
    return text
