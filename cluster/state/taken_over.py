"""What a campaign changes when it goes on: compared with its config.yaml, recorded there, as events and in its state.

config.yaml ends with `of_this_run`, which is no setting: the schema of its keys, the software, where it was begun, the
history of changes of the mathematics, and the plans of a learning rate that was planned anew.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import CARRIED, load_config, of_this_run, write_config
from cluster.records.reader import has_begun
from cluster.records.software import differences, software
from cluster.records.writer import CONFIG_FILE
from cluster.renamed_keys import SCHEMA
from cluster.state.campaign_state import CampaignState
from cluster.state.changes import Changed, changes, is_below
from learner.schedule import Plan, planned_again

OnEvent = Callable[..., None]
RATE = "learner.optimizer.learning_rate"
CHOOSING = ("prompts.keep", "prompts.margin", "prompts.curriculum", "prompts.shuffle")
"""Keys of prompts with which the same numbers are the same prompts."""


class TakenOver:
    """One run directory, between its last run and this one. Everything is accepted at once, or nothing is written."""

    def __init__(
        self, config: CampaignConfig, before: CampaignConfig, written: Mapping[str, Any], allowed: Sequence[str]
    ):
        """before: what it ran with. written: its `of_this_run`. allowed: of `--allow-change`. UserError: see `changes`."""
        self._config, self._before, self._allowed = config, before, allowed
        self.changed = changes(before, config, allowed)
        self._software: Mapping[str, str] = written.get("software") or {}
        self._begun_in = str(written.get("begun_in") or os.getcwd())
        self.history: list[dict[str, Any]] = list(written.get("history") or [])
        """Rows {"step", "key", "before", "after"}: what has changed the mathematics, oldest first."""
        self.plans = [Plan(**plan) for plan in written.get("plans") or []]
        """Of the learning rate, where it was planned anew."""

    @classmethod
    def of(cls, config: CampaignConfig, allowed: Sequence[str]) -> "TakenOver":
        """Of a run directory. Where no campaign has begun, only starts that were refused, it is written anew.

        UserError: see `changes` and `write`.
        """
        file = config.run_dir / CONFIG_FILE
        if file.exists() and has_begun(config.run_dir):
            return cls(config, load_config(file, environment=False), of_this_run(config.run_dir), allowed)
        taken = cls(config, config, {}, allowed)
        taken.write()
        return taken

    def accept(self, state: CampaignState, contents: Sequence[Changed], on_event: OnEvent) -> None:
        """Records the changes, before the campaign goes on from `state`; plans the learning rate anew where it needs that.

        contents: prompts and models whose contents are others. UserError: see `planned` and `write`.
        """
        free = {one.key: [one.before, one.after] for one in self.changed if one.change in ("free", "same contents")}
        step, tokens = state.step, state.tokens_generated
        plans = self.planned(step)
        for line in getattr(self._config, CARRIED, []):
            on_event("key_carried_over", cause=line)
        if free:
            on_event("configuration_changed", changed=free, step=step)
        for key, before, after, change in self.changed:
            if change == "on request":
                on_event("setting_changed", step=step, tokens_generated=tokens, key=key, before=before, after=after)
        for one in (*(one for one in self.changed if one.change == "on request"), *contents):
            self.history.append({"step": step, "key": one.key, "before": one.before, "after": one.after})
        if plans != self.plans:
            self.plans = plans
            if plans:
                rate, final_rate, until = plans[-1].rate, plans[-1].final_rate, plans[-1].until
                on_event(
                    "schedule_planned",
                    step=step,
                    tokens_generated=tokens,
                    rate=rate,
                    final_rate=final_rate,
                    until=until,
                )
        of_prompts = [one.key for one in self.changed if one.change == "on request" and is_below(one.key, ["prompts"])]
        if contents or set(of_prompts) - set(CHOOSING):
            state.prompts = {}  # other prompts, or another teacher: what was known of them holds no more
        if other := differences(self._software, software()):
            on_event("software_changed", changed=other, step=step)
        self.write()
        state.history, state.plans, state.software = self.history, self.plans, dict(software())

    def write(self) -> None:
        """Replaces config.yaml. UserError: it cannot be written."""
        own = {
            "schema": SCHEMA,
            "software": dict(software()),
            "begun_in": self._begun_in,
            "history": self.history,
            "plans": [plan.to_json() for plan in self.plans],
        }
        run_dir = self._config.run_dir
        try:
            write_config(self._config, run_dir / CONFIG_FILE, own)
        except OSError as error:
            raise UserError("output_dir", f"{run_dir} ({error.strerror})", "a directory to write to") from error

    def planned(self, step: int) -> list[Plan]:
        """The plans of the learning rate from here on. UserError: it has come down to 0, so there is none to go on with."""
        before = (self._before.pipeline.updates, self._before.learner.optimizer, self.plans)
        after = (self._config.pipeline.updates, self._config.learner.optimizer)
        plans = planned_again(step, before, after)
        if plans == self.plans or not plans or plans[-1].rate:
            return plans
        if is_below(RATE, self._allowed):
            return planned_again(step, before, after, afresh=True)
        found = f"{after[0]}, where the learning rate has come down to 0 at update {step}"
        raise UserError("pipeline.updates", found, f"{RATE}, the rate to go on from, with --allow-change {RATE}")
