"""What a campaign keeps of records: prompts as texts and as tokens, references, domains, responses. Column by column.

A batch is decoded, rendered and tokenised at once. Where one of its records is at fault, they are read one by one, so that the
first is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from actors.config import SourceConfig
from actors.errors import UserError
from actors.prompts.columns import Coded, Texts
from actors.prompts.files import field_of
from actors.prompts.record_batches import Batch
from actors.prompts.responses import Ends, Piece, Responses, pieces_of, prompt_of, tokenised
from actors.prompts.spool import OFFSETS, Part, Spool
from actors.prompts.texts import Reader, text_field
from actors.trajectory import offsets_of


@dataclass(frozen=True)
class Task:
    """Records to be read."""

    source: SourceConfig
    """One file, data set or function."""
    key: str
    """Configuration key of its source, for example "prompts.sources.sums"."""
    unit: str
    """What it is counted in, for messages: line, row or record."""
    batch: Batch


@dataclass(frozen=True)
class PartMaker:
    """Makes columns of records."""

    reader: Reader
    keep_records: bool
    """Whether all fields of each record are kept."""
    ends: Ends | None
    """How responses end; None: they are left out."""

    def fields(self, source: SourceConfig, key: str) -> list[tuple[str, str]]:
        """(configuration key, field) of each field that every record of a source needs."""
        named = [
            (f"{key}.prompt_field", source.prompt_field),
            (f"{key}.response_field", source.response_field),
            (f"{key}.reference_field", self._reference_field(source)),
            (f"{key}.domain_field", source.domain_field),
            *(("prompt_template", name) for name in self.reader.template_fields),
        ]
        return [(field_key, name) for field_key, name in named if name is not None]

    def part(self, task: Task) -> Part:
        """The columns of some records. UserError: one is at fault; the first is named."""
        try:
            return self._part(task)
        except UserError:
            if len(task.batch) == 1:
                raise
        one_by_one = Spool()
        for place in range(len(task.batch)):
            one_by_one.add(self._part(Task(task.source, task.key, task.unit, task.batch[place : place + 1])))
        return Part(one_by_one.columns(), one_by_one.domains)

    def _part(self, task: Task) -> Part:
        source, key, reader = task.source, task.key, self.reader
        numbers, records = zip(*task.batch.records(), strict=True)
        wheres = [f"{source.origin}, {task.unit} {number}" for number in numbers]
        found = {"numbers": np.array(numbers, np.int64)}
        if self.keep_records:
            found |= _columns_of("records", Texts.of(json.dumps(record, default=str) for record in records))
        rows = list(zip(records, wheres, strict=True))
        prompts = [field_of(record, source.prompt_field, where, f"{key}.prompt_field") for record, where in rows]
        pieces: list[list[Piece]] = []
        if source.response_field is not None:
            prompts, pieces = self._conversations(prompts, rows, source, key)
        texts = reader.texts(prompts, list(records), source, wheres)
        found |= _columns_of("texts", encoded := Texts.of(texts)) | {"texts.digests": encoded.digests()}
        reference = self._reference_field(source)
        references = [text_field(record, reference, where, f"{key}.reference_field") for record, where in rows]
        own = [text_field(record, source.domain_field, where, f"{key}.domain_field") for record, where in rows]
        domain = getattr(source, "domain", None)
        domains: Coded[str | None] = Coded.of(own if domain is None else [domain] * len(own))
        found |= _columns_of("references", Texts.of(references)) | {"domains": domains.codes}
        # A chat template writes the special tokens itself. The tokenizer adds them to a plain text only.
        special = not reader.section.chat
        ids = reader.tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)[
            "input_ids"
        ]
        found |= {"tokens": np.fromiter(chain.from_iterable(ids), np.int32), f"tokens{OFFSETS}": _offsets(ids)}
        if pieces and self.ends is not None:
            responses = tokenised(reader.tokenizer, pieces, self.ends, special=special)
            found |= {"responses": responses.tokens, f"responses{OFFSETS}": responses.offsets}
            found |= {"responses.trained": responses.trained}
        return Part(found, domains.values)

    def _conversations(
        self, prompts: list[Any], rows: list[tuple[dict[str, Any], str]], source: SourceConfig, key: str
    ) -> tuple[list[Any], list[list[Piece]]]:
        """(the prompts without the responses, the pieces of each conversation; [] where responses are left out)."""
        asked, pieces = [], []
        same = source.response_field == source.prompt_field
        for prompt, (record, where) in zip(prompts, rows, strict=True):
            answer = field_of(record, str(source.response_field), where, f"{key}.response_field")
            asked.append(prompt_of(prompt, answer, same, source, self.reader.section.chat, where))
            if self.ends is not None:
                pieces.append(pieces_of(self.reader, prompt, answer, same, record, source, where))
        return asked, pieces

    def _reference_field(self, source: SourceConfig) -> str | None:
        # Nobody judges a response that is there to be copied.
        return None if source.response_field is not None and self.ends is not None else source.reference_field


def _columns_of(name: str, texts: Texts) -> dict[str, np.ndarray]:
    return {name: texts.data, f"{name}{OFFSETS}": texts.offsets, f"{name}.missing": texts.missing}


def texts_in(columns: dict[str, np.ndarray], name: str) -> Texts:
    """The texts whose columns have this name; none where there are no such columns."""
    if name not in columns:
        return Texts.of([])
    digests = columns.get(f"{name}.digests")
    return Texts(columns[name], columns[f"{name}{OFFSETS}"], columns[f"{name}.missing"], digests)


def responses_in(columns: dict[str, np.ndarray]) -> Responses | None:
    """The responses, where there are any."""
    if "responses" not in columns:
        return None
    return Responses(
        tokens=columns["responses"], offsets=columns[f"responses{OFFSETS}"], trained=columns["responses.trained"]
    )


def _offsets(rows: Iterable[list[int]]) -> np.ndarray:
    return offsets_of(map(len, rows))
