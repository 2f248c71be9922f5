"""Whether prompts and models are still those that the campaign began with, whatever their paths say.

A trajectory's id names a prompt by its number. Other prompts under the same path would be trained on as if they were the old
ones, and another teacher would pull the student elsewhere, both without a word. Every checkpoint holds the fingerprints.
"""

from collections.abc import Callable, Sequence
from typing import Any

from actors.data.fingerprints import model_fingerprint, prompts_fingerprint
from actors.data.hub import COMMIT, split
from actors.data.models import find_model, looks_local
from actors.data.prompts import PromptSet
from actors.errors import UserError
from actors.teacher.backends import backend_of
from cluster.config import CampaignConfig

Fingerprints = dict[str, dict[str, str]]
"""Configuration key -> {"path": as it is configured, "fingerprint": of what is there}. Of a model on a hub the fingerprint is
its commit, so that its weights need not be downloaded to compare them."""


def fingerprints(config: CampaignConfig, prompts: PromptSet, held_out: PromptSet | None) -> Fingerprints:
    """What the campaign reads now."""
    found = {"prompts": (config.prompts.path, prompts_fingerprint(prompts))}
    if held_out is not None and config.evaluation.prompts is not None:
        found["evaluation.prompts"] = (config.evaluation.prompts.path, prompts_fingerprint(held_out))
    student = config.student
    models = {"student.model": (student.model, student.source, student.trust_remote_code)}
    for name, teacher in config.teachers.items():
        # A teacher on other servers has no files here.
        if backend_of(teacher, f"teachers.{name}").has_model_files:
            models[f"teachers.{name}.model"] = (teacher.model, teacher.source, teacher.trust_remote_code)
        if teacher.tokenizer is not None and teacher.tokenizer_source is not None:
            source = teacher.tokenizer_source
            models[f"teachers.{name}.tokenizer"] = (teacher.tokenizer, source, teacher.trust_remote_code)
    for key, (model, source, code) in models.items():
        if not looks_local(source) and (commit := split(source)[1]) is not None:
            found[key] = (model, commit)
            continue
        directory = find_model(source, key, weights=not key.endswith("tokenizer"), code=code)
        found[key] = (model, model_fingerprint(directory))
    return {key: {"path": str(path), "fingerprint": told} for key, (path, told) in found.items()}


def demand_same(before: Fingerprints, now: Fingerprints, allowed: Sequence[str], on_event: Callable[..., Any]) -> None:
    """Refuses other contents than those of the checkpoint, unless they are allowed; then tells them as an event.

    before: of the checkpoint; keys that it lacks (it is of an earlier release) are not compared. allowed: the keys of
    `--allow-change`, each with all keys below it. UserError: other contents, or a key that nothing has.
    """
    for key in allowed:
        if not any(_below(one, key) for one in now):
            raise UserError("--allow-change", key, "one of " + ", ".join(now), list(now))
    for key in sorted(before.keys() & now.keys()):
        then, here = before[key], now[key]
        if then["fingerprint"] == here["fingerprint"]:
            continue
        if COMMIT.fullmatch(here["fingerprint"]) and not COMMIT.fullmatch(then["fingerprint"]):
            # An earlier release recorded the contents, without the commit; they are not here to be compared.
            on_event("commit_unknown", key=key, path=here["path"], commit=here["fingerprint"])
            continue
        # Held-out prompts may be configured anew at any time (RESUMABLE_KEYS); the same path with other contents may not.
        moved = key.startswith("evaluation.") and then["path"] != here["path"]
        if not moved and not any(_below(key, one) for one in allowed):
            raise UserError(
                key,
                f"{here['path']} with other contents than the campaign began with",
                f"the same contents, another name for a new campaign, or --allow-change {key} to go on with these",
            )
        on_event("contents_changed", key=key, path=here["path"])


def _below(key: str, above: str) -> bool:
    return key == above or key.startswith(f"{above}.")
