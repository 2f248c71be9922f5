"""Writes docs/configuration.md from the dataclasses, every key with its default, its range and its meaning, and
docs/changes.md, which of them may change when a campaign goes on.

python docs/make_configuration.py [--check]
"""

import ast
import dataclasses
import inspect
import itertools
import sys
import textwrap
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cluster.config import CampaignConfig  # noqa: E402
from cluster.state.changes import keys_of  # noqa: E402

TARGET = ROOT / "docs" / "configuration.md"
CHANGES = ROOT / "docs" / "changes.md"
CLASSES = {
    "free": "It does not change the mathematics. The event `configuration_changed` records it.",
    "same contents": "A path or a name: free while what is there has the same fingerprint (it moved), and on request otherwise.",
    "on request": "It changes the mathematics from here on: `--allow-change KEY`.",
    "never": "It is another campaign, which can begin from this one's checkpoint.",
}
ABOUT_CHANGES = """# What may change when a campaign goes on

Generated from the dataclasses by `python docs/make_configuration.py`; do not edit.

The same command resumes a campaign. Some keys may then have another value, in the YAML file or as `key=value`:

    understudy run configs/quickstart.yaml learner.microbatch_tokens=4096
    understudy run configs/quickstart.yaml learner.optimizer.learning_rate=5e-7 --allow-change learner.optimizer.learning_rate
    understudy run configs/quickstart.yaml pipeline.updates=600

`--allow-change KEY` names a key or a section (`teachers.second` is all of a teacher that is added or removed) and may be
repeated; where nothing changes it does nothing, so a job that is submitted again keeps it. What is on request is recorded
with its step, before and after: as the event `setting_changed`, in the `history` at the end of `config.yaml`, in every
checkpoint from the next one on, and as a mark in the report's charts. A refusal names all keys at once and writes nothing.
A campaign that has taken no update yet, because its command was refused for example, binds nobody: any key may change.

## Longer than planned

`pipeline.updates` may be raised or lowered at any time, also of a campaign that has finished. If the learning rate depends on
it, the schedule is planned anew from the update s where the campaign is (`schedule_planned`); so it is when the schedule, its
warm-up, its final fraction or the learning rate change:

- Within the warm-up, the warm-up goes on. After it there is no second one.
- The rate begins at the rate of update s and goes, on the shape of `schedule`, to `final_fraction` of the learning rate at the
  last update: rate(u) = final + (rate(s) - final) x remaining((u - s) / (updates - s)), with remaining(p) = 1 - p or
  (1 + cos(pi p)) / 2. It never jumps up. `constant` keeps the rate of update s.
- Where the learning rate itself changes (on request), it begins at the new one.
- A schedule that has come down to 0 leaves nothing to go on with. The campaign says so, and goes on with
  `--allow-change learner.optimizer.learning_rate`, from the learning rate that is configured.
- A guard's factor on the rate stays. Plans are absolute: a campaign that goes back to an earlier checkpoint takes the same rates.

An adaptive `trust_region.beta` goes on from its value unless `beta` itself changes. The moments of AdamW stay in every case.
After other prompts, the place in the order of prompts stays, counted in prompts; what was issued and not trained is issued again.

## Another campaign from this one's checkpoint

What may never change makes a new campaign. It begins with the student of the old one:

    understudy run configs/quickstart.yaml name=second student.model=RUN/checkpoints/step_00000100 student.optimizer=keep

`student.optimizer: keep` begins with the checkpoint's AdamW moments (and their step counts), `new` with none. Update, schedule,
prompts and ledger begin anew. With `student.lora` only `new` is possible: a checkpoint's model holds the merged weights. Checkpoints
of a campaign that still runs are removed in time (`checkpoint.keep_last`): copy the directory, or [export](serving.md) it.

## Moving

The run directory, models and prompts may move. `understudy run --resume NEW_PLACE` takes the name and the output directory from
the place; models and prompts are found by `student.model=NEW_PATH` (and so on), which is free while the fingerprints are the same.
A relative path in `config.yaml` is looked for in the directory where the command is given and then, with `--resume`, in the one where
the campaign was begun (`of_this_run.begun_in`). Runs of 0.1 do not say where that was.

## Every key
"""


def meanings(cls: type) -> dict[str, str]:
    """Field -> the string below it, also of the dataclasses that this one extends."""
    above = {}
    for base in cls.__bases__:
        above |= meanings(base) if dataclasses.is_dataclass(base) else {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body  # type: ignore[attr-defined]
    return above | {
        item.target.id: " ".join(after.value.value.split())  # type: ignore[union-attr, attr-defined]
        for item, after in itertools.pairwise(body)
        if isinstance(item, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }


def type_name(hint: Any) -> str:
    """The name of a type in YAML's terms."""
    if get_origin(hint) is None:
        return getattr(hint, "__name__", str(hint))
    arguments = get_args(hint)
    if str(get_origin(hint)).endswith("Literal"):
        return " or ".join(f"`{a}`" for a in arguments)
    if get_origin(hint) in (list, dict):
        return f"{get_origin(hint).__name__} of {type_name(arguments[-1])}"
    return " or ".join("null" if a is type(None) else type_name(a) for a in arguments)


def section(cls: type, prefix: str) -> list[str]:
    """The tables of a dataclass and of the dataclasses nested in it."""
    hints, texts = get_type_hints(cls), meanings(cls)
    rows, nested = [], []
    for item in dataclasses.fields(cls):
        hint = hints[item.name]
        inner = [a for a in (hint, *get_args(hint)) if dataclasses.is_dataclass(a)]
        key = f"{prefix}{item.name}"
        if inner:
            many = get_origin(hint) is dict
            nested.append((inner[0], f"{key}.<name>." if many else f"{key}."))
            if item.name not in texts:
                continue
        default = item.default if item.default is not dataclasses.MISSING else None
        if item.default_factory is not dataclasses.MISSING:
            default = "" if inner else item.default_factory()
        limits = [
            f"{sign} {item.metadata[name]:g}"
            for name, sign in (("minimum", "≥"), ("above", ">"), ("maximum", "≤"))
            if item.metadata.get(name) is not None
        ]
        shown = (
            "**required**"
            if default == "???"
            else ""
            if default == ""
            else f"`{'null' if default is None else default}`"
        )
        rows.append(f"| `{key}` | {' '.join([type_name(hint), *limits])} | {shown} | {texts.get(item.name, '')} |")
    title = f"`{prefix.rstrip('.')}`" if prefix else "The campaign"
    lines = [f"## {title}", "", inspect.getdoc(cls) or "", ""]
    if rows:
        lines += ["| key | type | default | meaning |", "|---|---|---|---|", *rows, ""]
    for inner_class, inner_prefix in nested:
        lines += section(inner_class, inner_prefix)
    return lines


def of_changes() -> str:
    """The page of what may change."""
    lines = [ABOUT_CHANGES]
    for change, meaning in CLASSES.items():
        keys = [f"`{key.replace('*', '<name>')}`" for key, own in keys_of() if own == change]
        lines += [f"### {change.capitalize()}", "", meaning, "", *textwrap.wrap(", ".join(keys), 125), ""]
    lines.append(
        "`evaluation.verifier` and `evaluation.verifiers` are free where they only measure, and on request where training uses their rewards."
    )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Writes the pages, or with --check compares them with the dataclasses."""
    text = "\n".join(
        [
            "# Configuration",
            "",
            "Generated from the dataclasses by `python docs/make_configuration.py`; do not edit. Set a key in YAML, or as",
            "`key=value` on the command line; `key={}` empties a mapping. [What may change](changes.md) says which keys a running",
            "campaign may change.",
            "",
            *section(CampaignConfig, ""),
        ]
    )
    pages = {TARGET: text, CHANGES: of_changes()}
    if "--check" in sys.argv:
        return 0 if all(page.exists() and page.read_text("utf-8") == its for page, its in pages.items()) else 1
    for page, its in pages.items():
        page.write_text(its, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
