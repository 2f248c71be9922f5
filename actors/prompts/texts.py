"""The text of a prompt as a model reads it: from a record, by the chat template or as it is.

A teacher with privileged information reads its own text, made by `teachers.<name>.prompt_template`.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from actors.config import PromptsConfig, SourceConfig
from actors.data.messages import called_tools, in_json, messages_of, name_of, tools_of
from actors.data.models import as_user_error
from actors.errors import UserError
from actors.prompts.files import field_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FIELD = re.compile(r"\{(\w+)\}")
"""`{field}` in the prompt template of a teacher with privileged information."""
REFUSED = "a prompt that the chat template refuses", "messages that it accepts"
NOT_UNICODE = "a prompt that is not Unicode text", "no lone surrogates"


@dataclass(frozen=True)
class Reader:
    """How one model reads the records of all sources."""

    section: PromptsConfig
    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    """The text that a teacher with privileged information reads in place of the prompt, with `{field}` for fields."""

    @property
    def template_fields(self) -> list[str]:
        """Fields of the record that the template names."""
        return [name for name in TEMPLATE_FIELD.findall(self.template or "") if name != "prompt"]

    def text(self, prompt: Any, record: dict[str, Any], source: SourceConfig, where: str) -> str:
        """The text of one prompt as the student reads it; with a template, as a privileged teacher reads it."""
        if self.section.chat:
            messages = self._messages(prompt, record, source, where)
            text = self.render(messages, record, source, where, add_generation_prompt=not self._continued)
        elif not isinstance(prompt, str) or not prompt:
            raise UserError(where, f"{source.prompt_field} = {in_json(prompt)}", "a string (chat is false)")
        else:
            text = prompt if self.template is None else _fill(self.template, prompt, record, where)
        # JSON may hold half a surrogate pair, which tokenizers refuse with an error that names no record.
        with as_user_error(where, *NOT_UNICODE):
            text.encode()
        return text

    def texts(
        self, prompts: list[Any], records: list[dict[str, Any]], source: SourceConfig, wheres: list[str]
    ) -> list[str]:
        """`text` of several prompts, rendered in one call where that is the same. UserError: one of them is refused; which, is
        told right of one alone."""
        from transformers import PreTrainedTokenizerBase

        rows = list(zip(prompts, records, wheres, strict=True))
        own = type(self.tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template
        if not self.section.chat or own or any(record.get(source.tools_field) for record in records):
            return [self.text(prompt, record, source, where) for prompt, record, where in rows]
        conversations = [self._messages(prompt, record, source, where) for prompt, record, where in rows]
        with as_user_error(wheres[0], *REFUSED):
            rendered = self.tokenizer.apply_chat_template(conversations, **self._arguments(not self._continued))
            texts = [str(text) for text in rendered]
        for messages, text, where in zip(conversations, texts, wheres, strict=True):
            _refuse_left_out(called_tools(messages), text, where)
        with as_user_error(wheres[0], *NOT_UNICODE):
            "".join(texts).encode()
        return texts

    @property
    def _continued(self) -> bool:
        return bool(self.section.chat_template_arguments.get("continue_final_message"))

    def _arguments(self, add_generation_prompt: bool) -> dict[str, Any]:
        """Of the chat template."""
        given = self.section.chat_template_arguments
        return {"add_generation_prompt": add_generation_prompt, **given, "tokenize": False}

    def _messages(self, prompt: Any, record: dict[str, Any], source: SourceConfig, where: str) -> list[dict[str, Any]]:
        try:
            messages = messages_of(prompt, continued=self._continued)
        except ValueError as error:
            expected = "a string, or a list of messages with role and content that does not end with the assistant's"
            raise UserError(where, f"{source.prompt_field} = {in_json(prompt)} ({error})", expected) from error
        if self.template is not None:
            place = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
            messages[place]["content"] = _fill(self.template, messages[place]["content"], record, where)
        return messages

    def render(
        self,
        messages: list[dict[str, Any]],
        record: dict[str, Any],
        source: SourceConfig,
        where: str,
        *,
        add_generation_prompt: bool,
    ) -> str:
        """What the chat template makes of messages, with the tools of their record. UserError: it refuses them."""
        try:
            tools = tools_of(record.get(source.tools_field))
        except ValueError as error:
            found = f"{source.tools_field} = {in_json(record[source.tools_field])} ({error})"
            raise UserError(where, found, "a list of JSON schemas, one for each tool, or null") from error
        arguments = self._arguments(add_generation_prompt) | ({"tools": tools} if tools else {})
        with as_user_error(where, *REFUSED):
            text = str(self.tokenizer.apply_chat_template(messages, **arguments))
        _refuse_left_out([*called_tools(messages), *map(name_of, tools or [])], text, where)
        return text


def _refuse_left_out(tools: list[str], text: str, where: str) -> None:
    """UserError: a tool is not in the text. Many templates know nothing of tools, and would leave them out."""
    for name in tools:
        if name not in text:
            raise UserError(where, f"the tool {name!r}, which the chat template leaves out", "a template with tools")


def text_field(record: dict[str, Any], name: str | None, where: str, key: str) -> str | None:
    """A field of the record as text; None where it is null, or where no field is asked for."""
    value = None if name is None else field_of(record, name, where, key)
    if isinstance(value, float) and math.isnan(value):  # how pandas writes a number that is not there
        value = None
    if isinstance(value, list | dict | bytes) or value in (math.inf, -math.inf):
        raise UserError(where, f"{name} = {str(value)[:60]}", "a string, a number or null")
    return None if value is None else str(value)


def _fill(template: str, prompt: str, record: dict[str, Any], where: str) -> str:
    """The template with `{prompt}` and each `{field}` replaced by the prompt's text and the record's field."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] == "prompt":
            return prompt
        value = text_field(record, match[1], where, "prompt_template")
        if value is None:
            raise UserError(where, f"{match[1]} = null", "a string or a number, since prompt_template names it")
        return value

    return TEMPLATE_FIELD.sub(value_of, template)
