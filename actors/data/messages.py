"""Chat messages as data sets write them -> as chat templates read them. Standard library only.

As vLLM's server reads them: a list of text parts is one text, an assistant's turn that only calls tools has the text "",
fields that are null are absent, and the arguments of a tool call are an object, also where JSON text was written.
"""

import json
from typing import Any

from actors.json_files import parsed


def messages_of(prompt: Any, *, continued: bool) -> list[dict[str, Any]]:
    """The messages of one prompt; a plain string is the user's. ValueError: what is wrong with it, for a message.

    continued: the last message is the assistant's, and the student goes on with it (`continue_final_message`).
    """
    messages = [_message(message, f"message {number}") for number, message in enumerate(_listed(prompt, "user"), 1)]
    last = messages[-1]
    if continued and (last["role"] != "assistant" or not last["content"] or "tool_calls" in last):
        raise ValueError("continue_final_message is true, and the last message is not a text of the assistant's")
    # A conversation that already ends with an answer would teach the student only to stop.
    if not continued and last["role"] == "assistant":
        raise ValueError("the last message is the assistant's")
    if last["role"] == "user" and not last["content"]:
        raise ValueError("the last message is empty")
    return messages


def conversation_of(prompt: Any, response: Any, *, whole: bool) -> tuple[list[dict[str, Any]], int]:
    """(messages up to the last of the assistant's, the number of its first one that is a response).

    prompt: as in `messages_of`, a plain text is the user's. response: a text is the assistant's; or messages that follow the
    prompt's. whole: the prompt is the whole conversation, whose first answer of the assistant is already a response; `response`
    is not read. ValueError: what is wrong with it.
    """
    asked = _listed(prompt, "user")
    answered = [] if whole else _listed(response, "assistant")
    messages = [_message(message, f"message {number}") for number, message in enumerate([*asked, *answered], 1)]
    if whole and messages[0]["role"] == "assistant":
        raise ValueError("it begins with a message of the assistant's, which nobody has asked for")
    begins = 0 if whole else len(asked)
    turns = [number for number in range(begins, len(messages)) if messages[number]["role"] == "assistant"]
    if not turns:
        raise ValueError("no message of the assistant's")
    if empty := next(
        (turn for turn in turns if not messages[turn]["content"] and "tool_calls" not in messages[turn]), 0
    ):
        raise ValueError(f"message {empty + 1}, of the assistant's, is empty")
    return messages[: turns[-1] + 1], turns[0]


def in_json(value: Any) -> str:
    """A value as its file has it, for messages: `null`, `[5]`, `"a text"`; cut after 80 characters."""
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def _listed(value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        _refuse_json(value)
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError("no messages" if value == [] else "neither a text nor a list of messages")
    return value


def tools_of(value: Any) -> list[dict[str, Any]] | None:
    """The tools that a record offers, for the chat template: a list of JSON schemas, or JSON text that holds one.

    None: there are none. ValueError: what is wrong with it.
    """
    if isinstance(value, str):
        value = parsed(value) if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) and name_of(tool) for tool in value):
        raise ValueError("not a list of tools with names")
    return value


def check_unicode(value: Any) -> None:
    """ValueError: a text in it is not Unicode. JSON may hold half a surrogate pair, which no tokenizer reads."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        raise ValueError("text that is not Unicode (a lone surrogate)") from error


def called_tools(messages: list[dict[str, Any]]) -> list[str]:
    """The names of the tools that the messages call."""
    return [name_of(call) for message in messages for call in message.get("tool_calls", [])]


def name_of(tool: dict[str, Any]) -> str:
    """The name of a tool or of a call: `{"function": {"name": ...}}` or `{"name": ...}`; "" without one."""
    inner = tool.get("function", tool)
    name = inner.get("name") if isinstance(inner, dict) else None
    return name if isinstance(name, str) else ""


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise ValueError(f"{where} is not an object with role and content")
    found = {name: value for name, value in message.items() if value is not None}
    if not isinstance(found.get("role"), str):
        others = f"; it has {', '.join(map(str, message))}" if "role" not in message else ""
        raise ValueError(f"{where} has no role that is a text{others}")
    calls = found.pop("tool_calls", [])
    if calls:
        if found["role"] != "assistant" or not isinstance(calls, list):
            raise ValueError(f"{where} has tool_calls that are not a list of the assistant's")
        found["tool_calls"] = [_call(call, where) for call in calls]
    if "content" not in found and not calls:
        raise ValueError(f"{where} has no content")
    return {**found, "content": _text(found.get("content", ""), where)}


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ValueError(f"{where} has a content that is not a text")
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type", "none") if isinstance(part, dict) else type(part).__name__
            raise ValueError(f"{where} has a part of the type {kind}; the student reads text only")
    return "".join(part["text"] for part in content)


def _call(call: Any, where: str) -> dict[str, Any]:
    if not isinstance(call, dict) or not name_of(call):
        raise ValueError(f"{where} has a tool call without a name")
    if isinstance(call.get("function"), dict):
        return {name: value for name, value in call.items() if value is not None} | {
            "function": _with_arguments(call["function"], where)
        }
    return _with_arguments(call, where)


def _with_arguments(function: dict[str, Any], where: str) -> dict[str, Any]:
    arguments = function.get("arguments")
    if isinstance(arguments, str) and arguments.strip():
        try:
            arguments = parsed(arguments)
        except ValueError as error:
            raise ValueError(f"{where} has arguments of {name_of(function)} that are no JSON: {error}") from error
    if not isinstance(arguments or {}, dict):
        raise ValueError(f"{where} has arguments of {name_of(function)} that are no object")
    return {name: value for name, value in function.items() if value is not None} | {"arguments": arguments or {}}


def _refuse_json(text: str) -> None:
    """A list of messages that was written as text would become one user message in silence."""
    if not text:
        raise ValueError("it is empty")
    if not text.lstrip().startswith("["):
        return
    try:
        content = parsed(text)
    except ValueError:
        return
    if isinstance(content, list) and content and all(isinstance(one, dict) and "role" in one for one in content):
        raise ValueError("a text that holds a list of messages as JSON; write the list itself")
