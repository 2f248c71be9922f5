"""The student's calls of tools, found in its text by vLLM's own parsers (`vllm serve --tool-call-parser`)."""

import json
import logging
from collections.abc import Callable, Sequence
from typing import Any

from actors.errors import UserError

Parse = Callable[[str, Sequence[dict[str, Any]] | None, int], dict[str, Any]]
"""(text, tools, turn) -> the assistant's message."""


def check_parser(name: str) -> None:
    """UserError: vLLM has no parser of this name."""
    from vllm.tool_parsers import ToolParserManager

    known = ToolParserManager.list_registered()
    if name not in known:
        raise UserError(
            "environment.tool_parser", name or "''", f"null, or a parser of vLLM: {', '.join(sorted(known))}", known
        )


def tool_parser(name: str, tokenizer: Any) -> Parse:
    """The parser of this name. UserError: there is none, or it does not accept the student's tokenizer."""
    check_parser(name)
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    # Some parsers log each call that they cannot parse, with a traceback; a student that learns to call writes many.
    logging.getLogger("vllm.tool_parsers").setLevel(logging.CRITICAL)
    parser = ToolParserManager.get_tool_parser(name)
    try:
        parser(tokenizer)
    except Exception as error:  # a parser demands tokens that the student may not have
        found = f"{name}, which does not accept the student's tokenizer ({' '.join(str(error).split())[:120]})"
        raise UserError("environment.tool_parser", found, "the parser of the student's family, or null") from error

    def parse(text: str, tools: Sequence[dict[str, Any]] | None, turn: int) -> dict[str, Any]:
        request: Any = ChatCompletionRequest.model_validate(
            {"model": "student", "messages": [], "tools": tools or None}
        )
        plain = {"role": "assistant", "content": text}
        try:  # a new parser for each turn: parsers keep state
            found = parser(tokenizer, request.tools).extract_tool_calls(text, request)
            calls: list[dict[str, Any]] = [
                {
                    # Not vLLM's random ones: a retry, or a resumed campaign, writes the same. Some templates demand nine.
                    "id": f"call{turn:02d}{place:03d}"[:9],
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": json.loads(call.function.arguments or "{}")},
                }
                for place, call in enumerate(found.tool_calls or [])
            ]
        except Exception:  # of any kind: what cannot be parsed is the environment's to answer
            return plain
        if not calls or not all(isinstance(call["function"]["arguments"], dict) for call in calls):
            return plain
        return {"role": "assistant", "content": found.content or "", "tool_calls": calls}

    return parse
