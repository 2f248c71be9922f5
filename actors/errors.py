"""The failures that every floor may raise.

`UserError` is for what the person at the keyboard can mend: the command line turns it into one line and exit status 2.
`CampaignError` and its kind are for what broke while running: exit status 1. Nothing else is caught on the way up.
"""

import difflib
from collections.abc import Iterable, Mapping


class UserError(Exception):
    """Input that is at fault: which file or key, what was found, what was expected, and the nearest valid name."""

    def __init__(self, where: str, found: object, expected: str, choices: Iterable[str] = ()):
        """`where` is a configuration key or a path; `choices` are valid names, from which the nearest is suggested."""
        self.where, self.found, self.expected = where, found, expected
        nearest = difflib.get_close_matches(str(found), list(choices), n=1)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        super().__init__(" ".join(f"{where}: found {found}, expected {expected}{hint}".split()))

    def to_json(self) -> dict[str, str]:
        """As JSON has it, for files and for processes that share no memory; `from_json` is the inverse."""
        return {"where": self.where, "found": str(self.found), "expected": self.expected, "message": str(self)}

    @classmethod
    def from_json(cls, content: Mapping[str, str]) -> "UserError":
        """The error that `to_json` described, with the same message."""
        error = cls(content["where"], content["found"], content["expected"])
        error.args = (content["message"],)  # with the hint that `choices` gave
        return error

    def __reduce__(self) -> tuple:
        # Pickle would call __init__ with `args`, which holds the message alone.
        return UserError.from_json, (self.to_json(),)


class CampaignError(Exception):
    """A campaign cannot go on; the message names the actor or the step, the cause, and what to do."""


class LearnerLostError(CampaignError):
    """The learner's process has died, and with it the weights since the last checkpoint."""


class ActorFaultError(CampaignError):
    """An actor has failed as none should; it has to be replaced, and another may do better."""


class EngineError(ActorFaultError):
    """The engine below an actor has failed and cannot go on."""


class LostObjectError(CampaignError):
    """What a call was given is gone, with the node or the process that held it; nobody has begun with the call."""


class StoreFullError(CampaignError):
    """There is no room for objects: in Ray's object store, or on the disk that it spills to."""


class AbortedError(CampaignError):
    """A rollout actor has given up what it was told to."""


class WeightError(ActorFaultError):
    """A weight version is incomplete, corrupt, or does not fit the model that should load it."""


class CheckpointError(CampaignError):
    """A checkpoint could not be written; those before it are as they were."""


class GuardError(CampaignError):
    """A guard has stopped the campaign: which metric, what it was, and what its bound is."""


class NonFiniteLossError(CampaignError):
    """The loss or the gradient is not finite; the weights were left as they were before the step."""
