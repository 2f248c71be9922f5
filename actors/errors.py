"""The exceptions that every floor may raise. Standard library only.

`UserError`: the user's input is at fault. The command line prints it as one line and exits with status 2.
`CampaignError` and its subclasses: something broke while the campaign ran; exit status 1.
Every other exception is a defect of the program, and is shown with its traceback.
"""

import difflib
import errno
from collections.abc import Iterable, Mapping
from typing import Self

from actors.plain_text import concealed, printable

PASSING = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.ESTALE)
"""Errors of a disk that are waited for."""


class UserError(Exception):
    """A fault in the user's input, as one line: `where: found ..., expected ... (did you mean ...?)`.

    Example: UserError("teachers.a.backend", "vlm", "vllm or http", ["vllm", "http"]).
    """

    def __init__(self, where: str, found: object, expected: str, choices: Iterable[str] = ()):
        """where: a configuration key or a path. found: the value there, or what is wrong with it. expected: what would
        be right. choices: the valid names; the message suggests the one nearest to `found`."""
        self.where, self.found, self.expected = where, found, expected
        nearest = difflib.get_close_matches(str(found), list(choices), n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        text = f"{where}: found {found}, expected {expected}{hint}"
        super().__init__(concealed(printable(" ".join(text.split()))))

    def to_json(self) -> dict[str, str]:
        """The error as plain values, to be written to a file or sent to another process; see `from_json`."""
        return {
            "where": self.where,
            "found": concealed(str(self.found)),
            "expected": self.expected,
            "message": str(self),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, str]) -> Self:
        """The error that `to_json` was called on, with the same message."""
        error = cls(content["where"], content["found"], content["expected"])
        error.args = (content["message"],)  # which holds the suggestion from `choices`, too
        return error

    def __reduce__(self) -> tuple:
        # Pickle would call __init__ with `args`, which holds only the message.
        return UserError.from_json, (self.to_json(),)


class UnavailableError(UserError):
    """Something outside that the user's input names does not answer now: the same input may be right later."""

    def __reduce__(self) -> tuple:
        return UnavailableError.from_json, (self.to_json(),)


class CampaignError(Exception):
    """The campaign cannot go on. The message names the actor or the step, the cause, and what to do about it."""


class LearnerLostError(CampaignError):
    """The learner's process died; the weights since the last checkpoint are lost."""


class ActorFaultError(CampaignError):
    """An actor failed for a reason of its own. It is replaced, and the call is repeated on another actor."""


class EngineError(ActorFaultError):
    """An actor's inference engine failed and cannot go on."""


class LostObjectError(CampaignError):
    """An argument of a call is lost with the node or the process that held it; the call has not begun."""


class StoreFullError(CampaignError):
    """No room is left in Ray's object store, or on the disk that it spills to."""


class AbortedError(CampaignError):
    """A rollout actor aborted a request, because the campaign asked for it."""


class WeightError(ActorFaultError):
    """A weight version is incomplete or corrupt, or does not fit the model that should load it."""


class CheckpointError(CampaignError):
    """A checkpoint could not be written. Earlier checkpoints are intact."""


class DiskFullError(CheckpointError):
    """A checkpoint could not be written because the disk is full, or away for a moment: worth another try."""


def is_full_disk(error: BaseException) -> bool:
    """Whether a write failed for a reason that passes: a full disk or quota, a mount that is read-only or away."""
    return isinstance(error, DiskFullError) or (isinstance(error, OSError) and error.errno in PASSING)


class GivenUpError(CampaignError):
    """The learner has given up an update, as it was asked to: its weights and moments are those from before it."""


class GuardError(CampaignError):
    """A guard stopped the campaign. The message names the metric, its value and its bound."""


class NonFiniteLossError(CampaignError):
    """The loss or the gradient is not finite. The weights are those from before the step."""
