"""Whether prompts and models are still those that the campaign began with, whatever their paths say.

A trajectory's id names a prompt by its number. Other prompts under the same path would be trained on as if they were the old
ones, and another teacher would pull the student elsewhere, both without a word. Every checkpoint holds the fingerprints.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.data.hub import COMMIT, split
from actors.data.model_fingerprint import model_fingerprint
from actors.data.models import find_model, looks_local
from actors.errors import UserError
from actors.json_files import read_json
from actors.prompts.fingerprint import prompts_fingerprint
from actors.prompts.prompt_set import PromptSet
from actors.teacher.backends import backend_of
from cluster.config import CampaignConfig, prompt_sources
from cluster.state.changes import Changed, begin_anew, is_below, is_key, names_like

NO_NETWORK = (
    "dtype",
    "torch_dtype",
    "transformers_version",
    "_name_or_path",
    "use_cache",
    "eos_token_id",
    "pad_token_id",
)
"""Keys of config.json that say nothing of the layers."""
Fingerprints = dict[str, dict[str, str]]
"""Configuration key -> {"path": as it is configured, "fingerprint": of what is there}. Of a model on a hub the fingerprint is
its commit, so that its weights need not be downloaded to compare them."""


def fingerprints(
    config: CampaignConfig, prompts: PromptSet, held_out: PromptSet | None, sets: Mapping[str, PromptSet] | None = None
) -> Fingerprints:
    """What the campaign reads now. sets: name of an evaluation set -> its prompts."""
    found: dict[str, tuple[str, str]] = {}
    of_sets = {f"evaluation.sets.{name}.prompts": own for name, own in (sets or {}).items()}
    for key, records in prompt_sources(config).items():
        read = held_out if key.startswith("evaluation.") else prompts
        read = next((own for prefix, own in of_sets.items() if is_below(key, [prefix])), read)
        if read is not None:
            found[key] = (records.origin, prompts_fingerprint(read, read.rows_of(key)))
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
        if key.startswith("teachers.") and not config.started_teachers and not Path(source).exists():
            continue  # nobody loads it, and its files are not here
        directory = find_model(source, key, weights=not key.endswith("tokenizer"), code=code)
        found[key] = (model, model_fingerprint(directory))
    return {key: {"path": str(path), "fingerprint": told} for key, (path, told) in found.items()}


def demand_same(
    before: Fingerprints,
    now: Fingerprints,
    allowed: Sequence[str],
    on_event: Callable[..., Any],
    changed: Sequence[Changed] = (),
) -> list[Changed]:
    """Refuses other contents than those of the checkpoint, unless they are allowed; then tells them as an event, and returns
    those that change the mathematics.

    before: of the checkpoint, {} without one; keys that it lacks (it is of an earlier release) are not compared. allowed: of
    `--allow-change`, each with all keys below it. changed: configured keys that are others. UserError: other contents, a name
    of something that has no fingerprint, or a key that nothing has.
    """
    for key in allowed:
        if not any(is_below(one, [key]) for one in now) and not is_key(key):
            raise UserError("--allow-change", key, "one of " + ", ".join(now), [*names_like(key), *now])
    compared, others = before.keys() & now.keys(), []
    for one in changed:
        known = {one.key.removesuffix(end) for end in ("", ".path", ".revision", ".function")} & compared
        known |= {one.key.replace("tokenizer_revision", "tokenizer").replace("revision", "model")} & compared
        if one.change == "same contents" and before and not known and not is_below(one.key, allowed):
            found = f"{one.after} where the campaign had {one.before}, and nothing here tells whether it is the same"
            raise UserError(one.key, found, f"{one.before}, or --allow-change {one.key} to go on with this one")
    for key in sorted(compared):
        then, here = before[key], now[key]
        if then["fingerprint"] == here["fingerprint"]:
            continue
        if COMMIT.fullmatch(here["fingerprint"]) and not COMMIT.fullmatch(then["fingerprint"]):
            # An earlier release recorded the contents, without the commit; they are not here to be compared.
            on_event("commit_unknown", key=key, path=here["path"], commit=here["fingerprint"])
            continue
        # Held-out prompts may be configured anew at any time; the same path with other contents may not.
        moved = key.startswith("evaluation.") and then["path"] != here["path"]
        if not moved and not is_below(key, allowed):
            raise UserError(
                key,
                f"{here['path']} with other contents than the campaign began with",
                f"the same contents, another name for a new campaign, or --allow-change {key} to go on with these",
            )
        on_event("contents_changed", key=key, path=here["path"])
        if not moved:
            others.append(Changed(key, then["fingerprint"], here["fingerprint"], "on request"))
    return others


def demand_same_architecture(config: CampaignConfig, checkpoint: Path) -> None:
    """UserError: the files of `student.model`, which are allowed to be others, describe another network than the checkpoint."""
    key = "student.model"
    directory = find_model(config.student.source, key, weights=False, code=config.student.trust_remote_code)
    before, now = (_network(read_json(where / "config.json")) for where in (checkpoint, directory))
    if other := sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)):
        found = (
            f"a model whose config.json has {other[0]}: {now.get(other[0])}, and the campaign's {before.get(other[0])}"
        )
        raise UserError(key, found, f"the same network; or {begin_anew(config)}")


def _network(config: Any) -> dict[str, Any]:
    """What of a config.json describes the network."""
    return {name: value for name, value in config.items() if name not in NO_NETWORK}
