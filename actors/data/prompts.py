"""Reads, renders and tokenises the prompts once, and issues them in a seeded order.

The k-th prompt that a campaign issues is a pure function of k and the seed, so a checkpoint stores only the cursor k.
Order and seeds come from hashes and raw generator streams, which are the same in every release of the libraries.

Shapes: M prompts, P prompt tokens in all, B requests.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.config import PromptsConfig
from actors.data.messages import called_tools, messages_of, name_of, tools_of
from actors.data.models import as_user_error
from actors.data.prompt_files import BATCH, field_of, read_records
from actors.errors import UserError
from actors.trajectory import Requests, offsets_of, ragged_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE_FIELD = re.compile(r"\{(\w+)\}")
"""`{field}` in the prompt template of a teacher with privileged information."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts in the order of their file. Example: prompt 1 is tokens[offsets[1]:offsets[2]]."""

    tokens: np.ndarray
    """[P] int32."""
    offsets: np.ndarray
    """[M + 1] int64."""
    references: list[str | None]
    """[M] reference answers for the verifier; None where the record has none."""
    domains: list[str | None]
    """[M] domains, by which teachers are chosen; None where the record has none."""
    texts: list[str]
    """[M] the tokenised texts: prompts after the chat template."""

    def __len__(self) -> int:
        return len(self.references)

    def domains_of(self, ids: np.ndarray) -> list[str | None] | None:
        """[B] domains of the prompts of the trajectories with these ids [B, 3]; None if no prompt has one."""
        return [self.domains[prompt] for prompt in ids[:, 1]] if any(self.domains) else None

    def tokens_of(self, prompt: int) -> np.ndarray:
        """Token ids of one prompt, [length] int32."""
        return self.tokens[self.offsets[prompt] : self.offsets[prompt + 1]]

    def lengths_of(self, prompts: np.ndarray) -> np.ndarray:
        """Numbers of prompts [B] -> their lengths [B]. Costs nothing for the other prompts; a set may hold millions."""
        return self.offsets[prompts + 1] - self.offsets[prompts]


def load_prompts(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    key: str,
    template: str | None = None,
) -> PromptSet:
    """Reads, renders and tokenises every prompt of the file or dataset that `config` names.

    max_prompt_tokens: the context length minus the room for a response. key: the section's configuration key, for
    example "prompts" or "evaluation.prompts". template: the text that a teacher with privileged information reads in
    place of the prompt, with `{field}` for fields of the record. UserError: the file is missing, empty or broken; or a
    record lacks a field, has a wrong type or too long a prompt. It names the first such record, counted from 1.
    """
    if config.chat and not tokenizer.chat_template:
        raise UserError(f"{key}.chat", "true, and a tokenizer without a chat template", "a chat template, or false")
    fields = [
        (f"{key}.prompt_field", config.prompt_field),
        (f"{key}.reference_field", config.reference_field),
        (f"{key}.domain_field", config.domain_field),
        *(("prompt_template", name) for name in TEMPLATE_FIELD.findall(template or "") if name != "prompt"),
    ]
    needed = [(field_key, name) for field_key, name in fields if name is not None]
    unit, records = read_records(config, key, needed, [config.tools_field])
    numbers: list[int] = []
    references: list[str | None] = []
    domains: list[str | None] = []
    texts: list[str] = []
    lengths: list[int] = []
    tokens: list[np.ndarray] = []
    records = islice(records, config.limit)
    while batch := list(islice(records, BATCH)):
        for number, record in batch:
            where = f"{config.path}, {unit} {number}"
            prompt = field_of(record, config.prompt_field, where, f"{key}.prompt_field")
            texts.append(_render(prompt, record, template, config, tokenizer, where))
            references.append(_text_field(record, config.reference_field, where, f"{key}.reference_field"))
            domains.append(_text_field(record, config.domain_field, where, f"{key}.domain_field"))
            numbers.append(number)
        # A chat template writes the special tokens itself. The tokenizer adds them to a plain text only.
        rows = tokenizer(
            texts[-len(batch) :], add_special_tokens=not config.chat, return_attention_mask=False, verbose=False
        )["input_ids"]
        lengths += map(len, rows)
        # Arrays, batch by batch: lists of Python integers take about ten times the memory.
        tokens.append(np.fromiter(chain.from_iterable(rows), np.int32))
    if not texts:
        raise UserError(config.path, "no records", "at least one prompt")
    _check_lengths(lengths, max_prompt_tokens, lambda row: f"{config.path}, {unit} {numbers[row]}")
    return PromptSet(
        tokens=np.concatenate(tokens),
        offsets=offsets_of(lengths),
        references=references,
        domains=domains,
        texts=texts,
    )


def _check_lengths(lengths: list[int], most: int, where: Callable[[int], str]) -> None:
    """UserError: a prompt has no token, or more than `most`. where: names the record of a row, for the message."""
    found = np.array(lengths)
    for wrong, expected in (
        (np.flatnonzero(found == 0), "at least one token"),
        (np.flatnonzero(found > most), f"at most {most}, which leaves room for the response"),
    ):
        if len(wrong):
            count = f"({len(wrong)} of {len(lengths)} prompts are like this)"
            raise UserError(where(wrong[0]), f"a prompt of {lengths[wrong[0]]} tokens {count}", expected)


@lru_cache(maxsize=4)
def prompt_order(seed: int, epoch: int, count: int, shuffle: bool) -> np.ndarray:
    """The numbers 0 ... count - 1 in the order of this epoch, [count] int64, read-only. Not shuffled: ascending."""
    order = np.arange(count)
    if shuffle:
        # NumPy guarantees the raw stream of a bit generator for all releases, but not that of `permutation`.
        keys = np.random.Philox(key=_hash(f"order/{seed}/{epoch}")).random_raw(count)
        order = np.argsort(keys, kind="stable")
    order.flags.writeable = False  # all callers share the cached array
    return order


def position_to_id(cursor: int, seed: int, count: int, shuffle: bool) -> tuple[int, int]:
    """(epoch, prompt) of the prompt that is issued at this cursor (from 0). Every epoch issues each of `count` once."""
    epoch, place = divmod(cursor, count)
    return epoch, int(prompt_order(seed, epoch, count, shuffle)[place])


def sample_seed(seed: int, epoch: int, prompt: int, sample: int) -> int:
    """The sampler's seed for one trajectory, 0 <= seed < 2^63; the same in a retry, after a restart, on any machine."""
    return _hash(f"sample/{seed}/{epoch}/{prompt}/{sample}") >> 1


def requests(prompt_set: PromptSet, ids: np.ndarray, campaign_seed: int, *, judged: bool = False) -> Requests:
    """Requests for the samples with these ids, [B, 3]: epoch, prompt, sample. judged: with references, for rewards."""
    ids = np.asarray(ids, np.int64).reshape(-1, 3)
    rows = ids[:, 1]
    return Requests(
        ids=ids,
        seeds=np.array([sample_seed(campaign_seed, *row) for row in ids.tolist()], np.int64),
        prompt_tokens=ragged_rows(prompt_set.tokens, prompt_set.offsets, rows),
        prompt_offsets=offsets_of(prompt_set.lengths_of(rows)),
        references=tuple(prompt_set.references[row] for row in rows) if judged else (),
    )


def _hash(text: str) -> int:
    # Not Python's `hash`, which differs between processes.
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _text_field(record: dict[str, Any], name: str | None, where: str, key: str) -> str | None:
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
        value = _text_field(record, match[1], where, "prompt_template")
        if value is None:
            raise UserError(where, f"{match[1]} = null", "a string or a number, since prompt_template names it")
        return value

    return TEMPLATE_FIELD.sub(value_of, template)


def _render(
    prompt: Any,
    record: dict[str, Any],
    template: str | None,
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> str:
    """The text of one prompt as the student reads it; with a template, as a privileged teacher reads it."""
    if config.chat:
        text = _render_chat(prompt, record, template, config, tokenizer, where)
    elif not isinstance(prompt, str) or not prompt:
        raise UserError(where, f"{config.prompt_field} = {str(prompt)[:80]!r}", "a string (chat is false)")
    else:
        text = prompt if template is None else _fill(template, prompt, record, where)
    # JSON may hold half a surrogate pair, which tokenizers refuse with an error that names no record.
    with as_user_error(where, "a prompt that is not Unicode text", "no lone surrogates"):
        text.encode()
    return text


def _render_chat(
    prompt: Any,
    record: dict[str, Any],
    template: str | None,
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> str:
    continued = bool(config.chat_template_arguments.get("continue_final_message"))
    try:
        messages = messages_of(prompt, continued=continued)
    except ValueError as error:
        expected = "a string, or a list of messages with role and content that does not end with the assistant's"
        raise UserError(where, f"{config.prompt_field} = {str(prompt)[:80]!r} ({error})", expected) from error
    try:
        tools = tools_of(record.get(config.tools_field))
    except ValueError as error:
        found = f"{config.tools_field} = {str(record[config.tools_field])[:80]!r} ({error})"
        raise UserError(where, found, "a list of JSON schemas, one for each tool, or null") from error
    if template is not None:
        place = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=-1)
        messages[place]["content"] = _fill(template, messages[place]["content"], record, where)
    arguments = {"add_generation_prompt": not continued, **config.chat_template_arguments, "tokenize": False}
    if tools:
        arguments["tools"] = tools
    with as_user_error(where, "a prompt that the chat template refuses", "messages that it accepts"):
        text = str(tokenizer.apply_chat_template(messages, **arguments))
    # Many templates know nothing of tools, and would leave them out.
    for name in [*called_tools(messages), *map(name_of, tools or [])]:
        if name not in text:
            raise UserError(where, f"the tool {name!r}, which the chat template leaves out", "a template with tools")
    return text
