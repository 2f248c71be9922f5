"""Reads, renders and tokenises the prompts once, and issues them in a seeded order.

The k-th prompt that a campaign issues is a pure function of k and the seed, so a checkpoint stores only the cursor k.
Order and seeds come from hashes and raw generator streams, which are the same in every release of the libraries.

Shapes: M prompts, P prompt tokens in all, B requests.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.config import PromptsConfig
from actors.data.models import as_user_error, looks_local
from actors.errors import UserError
from actors.trajectory import Requests, offsets_of, ragged_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH = 1024
"""Records that are tokenised in one call."""


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
    unit, records = _records(config, key, template)
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
            prompt = _field(record, config.prompt_field, where, f"{key}.prompt_field")
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
    for wrong, expected in (
        (np.flatnonzero(np.array(lengths) == 0), "at least one token"),
        (
            np.flatnonzero(np.array(lengths) > max_prompt_tokens),
            f"at most {max_prompt_tokens}, which leaves room for the response",
        ),
    ):
        if len(wrong):
            found = f"a prompt of {lengths[wrong[0]]} tokens ({len(wrong)} of {len(texts)} prompts are like this)"
            raise UserError(f"{config.path}, {unit} {numbers[wrong[0]]}", found, expected)
    return PromptSet(
        tokens=np.concatenate(tokens),
        offsets=offsets_of(lengths),
        references=references,
        domains=domains,
        texts=texts,
    )


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


def _records(config: PromptsConfig, key: str, template: str | None) -> tuple[str, Iterator[tuple[int, dict[str, Any]]]]:
    """("line" or "row", iterator of (number from 1, record)); the word is used in messages."""
    path = Path(config.path).expanduser()
    if path.suffix in (".jsonl", ".parquet") or path.is_file() or (looks_local(config.path) and not path.is_dir()):
        if not path.is_file():
            near = [str(p) for p in path.parent.glob("*")]
            raise UserError(f"{key}.path", path, f"an existing .jsonl or .parquet file (from {Path.cwd()})", near)
        if path.suffix == ".jsonl":
            return "line", _jsonl(path)
        if path.suffix != ".parquet":
            raise UserError(f"{key}.path", config.path, "a .jsonl or .parquet file, or the name of a dataset")
        return "row", _arrow_rows(_parquet(path, config, key, template), config.path, key)
    return "row", _arrow_rows(_dataset(path, config, key, template), config.path, key)


def _jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where, expected = f"{path}, line {number}", "a JSON object on each line"
            try:
                # A byte-order mark can only be at the start of the file; some editors write one.
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError) as error:
                raise UserError(where, f"{line.strip()[:60]!r} ({error})", expected) from error
            if not isinstance(record, dict):
                raise UserError(where, f"{line.strip()[:60]!r}, a JSON {type(record).__name__}", expected)
            yield number, record


def _columns(names: list[str], config: PromptsConfig, key: str, template: str | None) -> list[str]:
    """The columns to read. UserError: one of them is not among `names`."""
    wanted = [
        (f"{key}.prompt_field", config.prompt_field),
        (f"{key}.reference_field", config.reference_field),
        (f"{key}.domain_field", config.domain_field),
        *(("prompt_template", name) for name in TEMPLATE_FIELD.findall(template or "") if name != "prompt"),
    ]
    present = [(field_key, name) for field_key, name in wanted if name is not None]
    for field_key, name in present:
        _field(dict.fromkeys(names), name, config.path, field_key)
    return list(dict.fromkeys(name for _, name in present))


def _parquet(path: Path, config: PromptsConfig, key: str, template: str | None) -> Iterator[Any]:
    from pyarrow import parquet

    file = parquet.ParquetFile(path)
    yield from file.iter_batches(BATCH, columns=_columns(file.schema_arrow.names, config, key, template))


def _dataset(path: Path, config: PromptsConfig, key: str, template: str | None) -> Iterator[Any]:
    import datasets
    from huggingface_hub import HfApi, is_offline_mode

    name, _, subset = config.path.partition(":")
    if path.is_dir():
        name, subset = str(path), ""
    elif not is_offline_mode():
        # Fails at once if the hub does not answer; load_dataset would retry for half a minute.
        HfApi().repo_info(name, repo_type="dataset")
    datasets.disable_progress_bars()
    found = datasets.load_dataset(name, subset or None, split=config.split)
    yield from (
        found.select_columns(_columns(found.column_names, config, key, template)).with_format("arrow").iter(BATCH)
    )


def _arrow_rows(batches: Iterator[Any], path: str, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    expected = "a Parquet file, a directory of data files, or a dataset (owner/name or owner/name:subset) on a hub that answers"
    number = 0
    with as_user_error(f"{key}.path", path, expected):
        for batch in batches:
            for record in batch.to_pylist():
                number += 1
                yield number, record


def _field(record: dict[str, Any], name: str, where: str, key: str) -> Any:
    if name not in record:
        raise UserError(key, name, f"a field of {where} ({', '.join(record)})", record)
    return record[name]


def _text_field(record: dict[str, Any], name: str | None, where: str, key: str) -> str | None:
    value = None if name is None else _field(record, name, where, key)
    if isinstance(value, list | dict | bytes):
        raise UserError(where, f"{name} = {str(value)[:60]}", "a string, a number or null")
    return None if value is None else str(value)


def _fill(template: str, prompt: str, record: dict[str, Any], where: str) -> str:
    """The template with `{prompt}` and each `{field}` replaced by the prompt's text and the record's field."""

    def field_of(match: re.Match[str]) -> str:
        return prompt if match[1] == "prompt" else str(_field(record, match[1], where, "prompt_template"))

    return TEMPLATE_FIELD.sub(field_of, template)


def _render(
    prompt: Any,
    record: dict[str, Any],
    template: str | None,
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
) -> str:
    """The text of one prompt as the student reads it; with a template, as a privileged teacher reads it."""
    if not _is_prompt(prompt, config.chat):
        expected = "a string, or a list of messages with role and content that does not end with the assistant's"
        raise UserError(
            where,
            f"{config.prompt_field} = {str(prompt)[:80]!r}",
            expected if config.chat else "a string (chat is false)",
        )
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if template is not None:
        *before, last = messages
        messages = [*before, {**last, "content": _fill(template, last["content"], record, where)}]
    text = messages[-1]["content"]
    if config.chat:
        with as_user_error(where, "a prompt that the chat template refuses", "messages that it accepts"):
            text = tokenizer.apply_chat_template(
                messages, **{"add_generation_prompt": True, **config.chat_template_arguments, "tokenize": False}
            )
    # JSON may hold half a surrogate pair, which tokenizers refuse with an error that names no record.
    with as_user_error(where, "a prompt that is not Unicode text", "no lone surrogates"):
        text.encode()
    return text


def _is_prompt(prompt: Any, chat: bool) -> bool:
    if isinstance(prompt, str):
        return bool(prompt)
    if not chat or not isinstance(prompt, list) or not prompt:
        return False
    well_formed = all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in prompt
    )
    # A conversation that already ends with an answer would teach the student only to stop.
    return well_formed and prompt[-1]["role"] != "assistant"
