"""Refuses sources of prompts that contradict each other or themselves. Pure; standard library only."""

import dataclasses
import os
import re
from collections.abc import Iterator, Mapping

from actors.config import MixedSourceConfig, PromptsConfig, SourceConfig
from actors.errors import UserError
from cluster.config import CampaignConfig
from learner.objective.estimator_table import estimator_row
from learner.validation import Contradiction

PLACE = ("path", "split", "revision", "function", "function_arguments")
"""Keys that say which records a source has."""


def refuse_sources(config: CampaignConfig) -> None:
    """UserError for the first contradiction in `prompts`, `evaluation.prompts` and the evaluation sets."""
    held_out = config.evaluation.prompts
    sets = [(f"evaluation.sets.{name}.prompts", one.prompts) for name, one in config.evaluation.sets.items()]
    for key, section in (("prompts", config.prompts), ("evaluation.prompts", held_out), *sets):
        if section is None:
            continue
        for wrong, where, found, expected in (
            *_several(key, section),
            *(row for its, source in section.each_source(key).items() for row in _one(its, source)),
            *_weights(key, section.sources, trained=section is config.prompts),
            *_responses(key, section),
            *(_trained_responses(config) if section is config.prompts else ()),
            *(_choice(config) if section is config.prompts else ()),
        ):
            if wrong:
                raise UserError(where, found, expected)


def _several(key: str, section: PromptsConfig) -> Iterator[Contradiction]:
    """Names of sources, and keys that only one of them can have."""
    for item in dataclasses.fields(SourceConfig) if section.sources else ():
        default = item.default if item.default is not dataclasses.MISSING else {}
        value = getattr(section, item.name)
        expected = f"nothing where there are {key}.sources: each has a {item.name} of its own"
        yield value != default, f"{key}.{item.name}", value, expected
    seen: dict[str, str] = {}
    for name, source in section.sources.items():
        where = f"{key}.sources.{name}"
        yield not re.fullmatch(r"[\w-]+", name), f"{key}.sources", repr(name), "a name of letters, digits, '_' and '-'"
        place = str([_written(getattr(source, part)) if part == "path" else getattr(source, part) for part in PLACE])
        expected = f"each source once; {key}.sources.<name>.weight says how often its prompts are drawn"
        yield place in seen, where, f"{source.origin}, which {seen.get(place)} is too", expected
        seen.setdefault(place, where)
        both = source.domain is not None and source.domain_field is not None
        yield both, f"{where}.domain", source.domain, "null where domain_field names a field with the domain"


def _choice(config: CampaignConfig) -> Iterator[Contradiction]:
    """Prompts that are passed over by a reverse KL that is not on the student's own text."""
    estimator = config.learner.objective.estimator
    on_teacher = estimator_row(estimator).text_by == "teacher"
    for key, value, off in (
        ("prompts.keep", config.prompts.keep, "all"),
        ("prompts.curriculum", config.prompts.curriculum, "none"),
    ):
        expected = f"{off} with the estimator {estimator}: the reverse KL is of text that the student writes"
        yield on_teacher and value != off, key, value, expected


def _written(path: str | None) -> str | None:
    """A path without `.` and `//`. That two paths lead to the same file is known where they are read."""
    return None if path is None else os.path.normpath(os.path.expanduser(path))


def _one(key: str, source: SourceConfig) -> Iterator[Contradiction]:
    """Where the records of one source come from."""
    own = source.function is not None
    nothing = source.path is None and not own
    expected = "a value: a file, a directory, a dataset" + ("" if ".sources." in key else f"; or {key}.sources")
    yield nothing, f"{key}.path", "nothing", f"{expected}; or {key}.function"
    both = source.path is not None and own
    yield both, f"{key}.function", source.function, f"null where there is a path ({source.path})"
    yield (
        bool(source.function_arguments) and not own,
        f"{key}.function_arguments",
        source.function_arguments,
        "a function",
    )
    for name, value, default in (
        ("split", source.split, "train"),
        ("revision", source.revision, None),
        ("streaming", source.streaming, False),
    ):
        yield own and value != default, f"{key}.{name}", value, "nothing where a function yields the records"
    endless = source.streaming and source.limit is None
    yield endless, f"{key}.limit", "null", "how many rows to read where streaming is true"


def _weights(key: str, sources: Mapping[str, MixedSourceConfig], *, trained: bool) -> Iterator[Contradiction]:
    """Weights of all sources, or of none."""
    given = [name for name, source in sources.items() if source.weight is not None]
    without = next((name for name in sources if name not in given), None)
    for name in given[:1]:
        weight, where = sources[name].weight, f"{key}.sources.{name}.weight"
        yield not trained, where, weight, "null: each held-out prompt is answered once"
        expected = f"a weight, as {where} has one; or none for all, in proportion to their numbers of prompts"
        yield without is not None, f"{key}.sources.{without}.weight", "null", expected


def _responses(key: str, section: PromptsConfig) -> Iterator[Contradiction]:
    """Responses of all sources, or of none."""
    given = [name for name, source in section.sources.items() if source.response_field is not None]
    without = next((name for name in section.sources if given and name not in given), None)
    expected = f"the field with the response, as {key}.sources.{next(iter(given), '')} has one; or none for all"
    yield without is not None, f"{key}.sources.{without}.response_field", "null", expected
    continued = section.has_responses and bool(section.chat_template_arguments.get("continue_final_message"))
    expected = "nothing where there are responses (response_field), which begin with a turn of the assistant"
    yield continued, f"{key}.chat_template_arguments.continue_final_message", "true", expected
    for where, source in section.each_source(key).items():
        same = source.response_field is not None and source.response_field == source.prompt_field and not section.chat
        expected = (
            f"another field than {source.prompt_field}: without a chat template a text has no turns (chat is false)"
        )
        yield same, f"{where}.response_field", source.response_field, expected


def _trained_responses(config: CampaignConfig) -> Iterator[Contradiction]:
    """What trains on responses of a data set."""
    for where, source in config.prompts.each_source("prompts").items():
        estimator = config.learner.objective.estimator
        ignored = source.response_field is not None and config.text_by != "data"
        expected = f"null, or learner.objective.estimator=sft: with {estimator} the student writes"
        yield ignored, f"{where}.response_field", source.response_field, expected
    expected = (
        "nothing where the prompts come with responses (prompts.response_field), which are kept and scored nowhere"
    )
    yield config.text_by == "data" and config.record, "record", "true", expected
    yield config.text_by == "data" and config.replay is not None, "replay", config.replay, expected
    samples = config.pipeline.samples_per_prompt
    several = config.text_by == "data" and samples > 1
    yield (
        several,
        "pipeline.samples_per_prompt",
        samples,
        "1: a prompt comes with one response (prompts.response_field)",
    )
