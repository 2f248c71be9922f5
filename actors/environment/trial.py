"""Tries an environment before the campaign starts: its class, its first messages, and the chat template that continues them."""

import asyncio
import json
import os
from dataclasses import replace
from typing import Any

from actors.config import EnvironmentConfig, PromptsConfig, SamplingConfig
from actors.data.messages import name_of
from actors.environment.actor import EnvironmentActor
from actors.environment.base import Begun, Episode
from actors.environment.continuation import CALL_ID, Continuation, Message, checked
from actors.errors import UserError
from actors.prompts.prompt_set import load_prompts, sample_seed
from actors.trajectory import EVALUATION_EPOCH, TrajectoryId

ANSWERS: dict[str, list[Message]] = {
    "user": [{"role": "user", "content": "…"}],
    "tool": [{"role": "tool", "content": "…", "tool_call_id": CALL_ID}],
}
"""What an environment may answer, by the role of its messages."""
MOST_TOKENS = 1 << 24
"""Of a prompt, where it is not known what there is room for: no model reads so many."""


def try_environment(
    config: EnvironmentConfig,
    prompts: PromptsConfig,
    tokenizer: Any,
    stop_token_ids: list[int],
    sampling: SamplingConfig | None = None,
    room: int | None = None,
) -> str:
    """Begins one episode with the first record: what was found. It has the id of an evaluation's, and no step is taken.

    sampling: of the campaign, for a program. room: tokens that a prompt may have; None: not known. UserError: the class, the
    program or the parser is not there, `reset` fails, its messages are too long, or the chat template cannot continue them.
    """
    if config.tool_parser is not None:
        from actors.environment.vllm_tool_parser import tool_parser

        tool_parser(config.tool_parser, tokenizer)
    section = replace(prompts, sources={name: replace(one, limit=1) for name, one in prompts.sources.items()})
    one = load_prompts(
        section if section.sources else replace(section, limit=1), tokenizer, None, "prompts", records=True
    )
    begun = asyncio.run(_begin(config, sampling, one.records[0]))
    if begun.error:
        found = f"{config.title}, whose {begun.error}, with the first record"
        raise UserError(config.key, found, "an episode that begins (docs/environments.md)")
    first, written = (
        ANSWERS["user"],
        Continuation(tokenizer, frozenset(stop_token_ids), prompts.chat_template_arguments),
    )
    if begun.messages is not None:
        try:
            first = checked(begun.messages, first=True)
            _refuse_long(config, written.least(first), room, " or more")
            shown = written.render(first, begun.tools)
        except ValueError as error:
            raise UserError(config.key, f"{config.title}, which begins with {error}", "chat messages") from error
        # Many templates know nothing of tools, and would leave them out.
        for name in () if config.command else map(name_of, begun.tools or []):  # a program's requests have their own
            if name not in shown:
                found = f"{config.title}, whose tool {name!r} the chat template leaves out"
                expected = "a template with tools; or no `tools`, and a message of the role system that describes them"
                raise UserError(config.key, found, expected)
    wrong = {role: told for role, new in ANSWERS.items() if (told := written.difference(first, new, begun.tools))}
    if len(wrong) == len(ANSWERS) and config.earlier_turns == "template":
        found = f"template, and a chat template that does not only append: {wrong['user']}"
        raise UserError("environment.earlier_turns", found, "`written`, or another template (docs/environments.md)")
    notes = [f"; note: with messages of the role {role}, {told}" for role, told in wrong.items()]
    length = "the record's prompt"
    if begun.messages is not None:
        tokens = len(written.prompt(first, begun.tools))
        _refuse_long(config, tokens, room)
        length = f"{tokens} tokens"
    return f"{config.title}, first prompt: {length}{''.join(notes)}"


def _refuse_long(config: EnvironmentConfig, tokens: int, room: int | None, more: str = "") -> None:
    """UserError where the first messages have more tokens than there is room for. more: what is said behind their number."""
    most, way_out = (MOST_TOKENS, "") if room is None else (room, "; prompts.max_prompt_tokens makes room for more")
    if tokens > most:
        found = f"{config.title}, whose first messages have {tokens:,} tokens{more} with the first record"
        raise UserError(config.key, found, f"at most {most:,}{way_out}")


async def _begin(config: EnvironmentConfig, sampling: SamplingConfig | None, record: str) -> Begun:
    actor, id_ = EnvironmentActor(config, sampling, os.getcwd()), TrajectoryId(EVALUATION_EPOCH, 0, 0)
    actor.exit = lambda _: os._exit(2)  # this process is the command's: what the user named is at fault
    try:
        return await actor.reset("check", Episode(id_, sample_seed(0, *id_)), json.loads(record))
    except asyncio.CancelledError:
        return Begun(error="reset raised CancelledError")
    finally:
        await actor.close("check")
