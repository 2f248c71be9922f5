"""How a loop ends before its last update: what is saved first, and which error counts.

    interrupted                            the update under way is given up, and the one before it is saved
    an error, and the learner lives        the update under way is finished and saved, then the error
    the learner is lost; a guard's error   nothing is saved: its weights are gone, or rejected

The learner gives up between two micro-batches, before the first optimiser step. An update that has taken one is finished
and saved: of several steps (`learner.epochs_per_update`, `minibatches_per_update`) the others are still to come. The
trajectories of an update that was given up stay open in the ledger, so the campaign that resumes samples them again.
An update that failed in the middle of its steps is not saved either: its weights belong to no update.
"""

import asyncio
from collections.abc import Callable

from actors.errors import CampaignError, CheckpointError, GuardError, LearnerLostError
from cluster.fleet.ray_fleet import Fleet
from cluster.state.campaign_state import CampaignState
from cluster.state.checkpoints import Checkpoints
from cluster.state.rollback import RollBack

NOT_TO_BE_SAVED = (LearnerLostError, RollBack, GuardError)
"""Errors after which the state of the campaign is not one to continue from."""
ANSWER_SECONDS = 60.0
"""How long a learner may take to say that it lives. It has no other call under way."""


def error_of(task: asyncio.Task) -> BaseException | None:
    """The error that a task has ended with, if it has."""
    return task.exception() if task.done() and not task.cancelled() else None


class Ending:
    """Ends the loop of one campaign."""

    def __init__(
        self,
        checkpoints: Checkpoints,
        state: CampaignState,
        learner: Fleet,
        turn: asyncio.Lock,
        on_event: Callable[..., None],
    ):
        """turn: a lock. Each caller of the learner holds it for a whole update."""
        self._checkpoints, self._state, self._learner = checkpoints, state, learner
        self._turn, self._on_event = turn, on_event

    async def interrupted(self, train: asyncio.Task) -> None:
        """Saves the newest update, once the one under way is given up or finished; raises the error of that, if it fails.

        train: the stage that takes updates.
        """
        # Beside the wait for the turn: a learner that does not answer is lost, which ends that wait too.
        telling = asyncio.create_task(self._learner.call_beside("give_up"))
        try:
            async with self._turn:
                if failure := error_of(train):
                    raise failure
                self._on_event("interrupted", step=self._state.step)
                self._state.uncount_open()
                await self._checkpoints.save(self._state, self._learner)
                await self._checkpoints.settle()
        finally:
            telling.cancel()

    async def failed(self, error: BaseException, train: asyncio.Task, patience: float) -> None:
        """The same after the error of a stage, where there is something to save, and raises that error.

        patience: seconds that the update under way may take.
        """
        if not isinstance(error, (*NOT_TO_BE_SAVED, CheckpointError)) and isinstance(error, Exception):
            try:
                async with asyncio.timeout(patience):
                    await self._turn.acquire()  # for good: no other update begins
                if not isinstance(error_of(train), NOT_TO_BE_SAVED):
                    await self._save(error)
            except Exception as another:  # of any kind: the first error is the one that the user needs
                cause = str(another) or f"the update under way takes longer than {patience:g} s"
                self._on_event("not_saved_at_the_end", step=self._state.step, cause=cause)
        raise error

    async def _save(self, error: Exception) -> None:
        step = self._state.step
        if step == 0 or self._checkpoints.exists(step):
            return
        async with asyncio.timeout(ANSWER_SECONDS):
            version = (await self._learner.call("status"))["policy_version"]
        if version != step:
            raise CampaignError(f"the learner holds update {version}, the campaign stands at {step}")
        self._on_event("saved_at_the_end", step=step, cause=f"{type(error).__name__}: {error}")
        await self._checkpoints.save(self._state, self._learner)
        await self._checkpoints.settle()
