"""Reads, renders and tokenises the prompts once, and makes requests of them.

The k-th prompt that a campaign issues is a pure function of k and the seed (actors/prompts/order.py), so a checkpoint stores only the
cursor k. A sample's seed comes from a hash of its id.

Shapes: M prompts, P prompt tokens in all, B requests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from actors.config import PromptsConfig, SourceConfig
from actors.errors import UserError
from actors.heartbeat import beat, does
from actors.prompts.cache import Columns, Damaged, SourceFile, Span, entry_of, is_plain
from actors.prompts.columns import Coded, Texts, many_rows
from actors.prompts.files import files_of, read_records
from actors.prompts.order import hash_of
from actors.prompts.parts import PartMaker, Task, responses_in, texts_in
from actors.prompts.responses import Ends, Responses
from actors.prompts.spool import MANY, OFFSETS, Spool
from actors.prompts.texts import Reader
from actors.prompts.workers import MOST_WORKERS, Parts, cores
from actors.trajectory import (
    FINISH_REASONS,
    Aside,
    Requests,
    RolloutCounts,
    Trajectories,
    offsets_of,
    ragged_rows,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Origin(NamedTuple):
    """Where consecutive prompts of a set are from: one file, data set or function."""

    key: str
    """Configuration key of the source, for example "prompts.sources.sums"."""
    name: str
    """Path or function."""
    unit: str
    """What it is counted in, for messages: line, row or record."""
    prompts: int
    """Prompts of the set that are from there."""
    tools_field: str = "tools"
    """The records' field of tools."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Prompts in the order of their file, of several sources one after the other.

    Example: prompt 1 is tokens[offsets[1]:offsets[2]].
    """

    tokens: np.ndarray
    """[P] int32."""
    offsets: np.ndarray
    """[M + 1] int64."""
    references: Texts
    """[M] reference answers for the verifier; None where the record has none."""
    domains: Coded[str | None]
    """[M] domains, by which teachers are chosen; None where the record has none."""
    texts: Texts
    """[M] the tokenised texts: prompts after the chat template."""
    numbers: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    """[M] int64: the number of the record in its file, from 1; [0]: not known."""
    records: Texts = field(default_factory=lambda: Texts.of([]))
    """[M] all fields of each record as JSON, where a verifier asks for them; else of no rows."""
    judged_without_reference: frozenset[str | None] = frozenset()
    """Domains whose verifier reads the prompt or the record, and so judges also prompts without a reference."""
    origins: tuple[Origin, ...] = ()
    """Where they are from, in their order."""
    responses: Responses | None = None
    """The responses that are trained on, where the records have them (`response_field`)."""
    played: bool = False
    """Whether each begins an episode with an environment, which reads the record and gives the reward."""
    cached: str = ""
    """Where the columns are on the disk, in a sentence; "" where they are in memory."""
    uncached: str = ""
    """Why they are not on the disk as they should be, or were not; "" where nothing is to be told."""

    def __len__(self) -> int:
        return len(self.references)

    @property
    def counts(self) -> dict[str, int]:
        """Configuration key of each source -> its prompts; a single source is called ""."""
        found: dict[str, int] = {}
        for origin in self.origins:
            found[origin.key] = found.get(origin.key, 0) + origin.prompts
        return found if len(found) > 1 else {"": len(self)}

    def judged(self) -> np.ndarray:
        """[m] the prompts whose responses get a reward, ascending: from a verifier, or from an environment."""
        if self.played:
            return np.arange(len(self))
        without = self.judged_without_reference
        return np.flatnonzero(~self.references.missing | self.domains.where(lambda domain: domain in without))

    def aside(self, row: int) -> Aside:
        """What a verifier may know of a prompt besides its reference."""
        if not self.records:
            return Aside(self.domains[row], self.texts[row])
        return Aside(self.domains[row], self.texts[row], self.records[row], self.origin_of(row).tools_field)

    def rows_of(self, key: str) -> range:
        """The prompts of the source with this configuration key; all, where nothing tells one source from another."""
        places = [place for place, origin in enumerate(self.origins) if origin.key == key]
        if not places:
            return range(len(self))
        ends = np.cumsum([0, *(origin.prompts for origin in self.origins)]).tolist()
        return range(ends[places[0]], ends[places[-1] + 1])

    def origin_of(self, prompt: int) -> Origin:
        """Where a prompt is from."""
        left = prompt
        for origin in self.origins:
            if left < origin.prompts:
                return origin
            left -= origin.prompts
        raise IndexError(prompt)

    def where(self, prompt: int) -> str:
        """The file and the record of a prompt, for messages: `train.jsonl, line 3`."""
        origin = self.origin_of(prompt)
        return f"{origin.name}, {origin.unit} {self.numbers[prompt]}"

    def take(self, rows: np.ndarray) -> PromptSet:
        """The prompts with these numbers, ascending [m]."""
        ends = np.cumsum([0, *(origin.prompts for origin in self.origins)])
        left = np.diff(np.searchsorted(rows, ends)).tolist()
        return replace(
            self,
            tokens=many_rows(self.tokens, self.offsets, rows),
            offsets=offsets_of(self.lengths_of(rows)),
            references=self.references.take(rows),
            domains=self.domains.take(rows),
            texts=self.texts.take(rows),
            numbers=self.numbers[rows],
            records=self.records.take(rows) if self.records else self.records,
            origins=tuple(one._replace(prompts=count) for one, count in zip(self.origins, left, strict=True)),
            responses=self.responses and self.responses.take(rows),
        )

    def domains_of(self, ids: np.ndarray) -> list[str | None] | None:
        """[B] domains of the prompts of the trajectories with these ids [B, 3]; None if no prompt has one."""
        return [self.domains[prompt] for prompt in ids[:, 1]] if any(self.domains.values) else None

    def tokens_of(self, prompt: int) -> np.ndarray:
        """Token ids of one prompt, [length] int32."""
        return self.tokens[self.offsets[prompt] : self.offsets[prompt + 1]]

    def lengths_of(self, prompts: np.ndarray) -> np.ndarray:
        """Numbers of prompts [B] -> their lengths [B]. Costs nothing for the other prompts; a set may hold millions."""
        return self.offsets[prompts + 1] - self.offsets[prompts]


def load_prompts(
    config: PromptsConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int | None,
    key: str,
    template: str | None = None,
    *,
    records: bool = False,
    ends: Ends | None = None,
) -> PromptSet:
    """Reads, renders and tokenises every prompt of the sources that `config` names, in their order.

    max_prompt_tokens: the context length minus the room for a response; None: any length (a longer prompt stays, too, where
    `too_long` is not `refuse`: filters.py leaves it out). key: the section's configuration
    key, for example "prompts" or "evaluation.prompts". template: the text that a teacher with privileged information reads in
    place of the prompt, with `{field}` for fields of the record. records: keep all fields of each. ends: read the responses too,
    where sources have a `response_field`, and end them so; None: they are left out. UserError: a source is missing, empty or broken; or a
    record lacks a field, has a wrong type or too long a prompt. It names the first such record, counted from 1.
    """
    if config.chat and not tokenizer.chat_template:
        raise UserError(f"{key}.chat", "true, and a tokenizer without a chat template", "a chat template, or false")
    files = _files(config, key)
    maker = PartMaker(Reader(config, tokenizer, template), records, ends)
    found = _prompts(maker, files)
    refuses = max_prompt_tokens is not None and config.too_long == "refuse"
    check_lengths(found, max_prompt_tokens if refuses else None, "which leaves room for the response")
    check_lengths(found, config.max_prompt_tokens if refuses else None, f"{key}.max_prompt_tokens")
    return found


def _files(config: PromptsConfig, key: str) -> list[SourceFile]:
    """All files, data sets and functions, in their order. UserError: see `files_of`; or a file belongs to two sources."""
    found: list[SourceFile] = []
    seen: dict[str, str] = {}
    for source_key, source in config.each_source(key).items():
        for file in files_of(source, source_key):
            _refuse_again(file, source_key, seen)
            found.append(SourceFile(source_key, source, file))
    return found


def _refuse_again(file: SourceConfig, key: str, seen: dict[str, str]) -> None:
    """UserError: a file belongs to another source, too. seen: file -> the source that it belongs to; it is put there."""
    if file.path is None or not os.path.isfile(path := os.path.realpath(os.path.expanduser(file.path))):
        return
    if seen.setdefault(path, key) != key:
        raise UserError(key, f"{file.path}, which belongs to {seen[path]} too", "each file in one source")


def _prompts(maker: PartMaker, files: Sequence[SourceFile]) -> PromptSet:
    """The prompts of these files: mapped from the disk where an earlier start has left them there, else read."""
    does("looking for prompts that were read before")
    entry, found, wrong = entry_of(maker, files), None, ""
    try:
        found = entry.opened() if entry is not None else None
    except Damaged as error:
        wrong = f"{error}, so the prompts were read again"
    there = f"mapped from {entry.directory}" if entry is not None and found is not None else ""
    if found is None:
        origins: list[Span] = []
        spool = Spool() if entry is None else entry.spool()
        try:
            _read(maker, files, spool, origins)
            if entry is not None and spool.rows >= MANY:
                found = entry.keep(spool, origins)
                there = f"kept for the next start in {entry.directory}" if found is not None else ""
            if found is None:
                found = Columns(spool.columns(), spool.domains, origins)
        finally:
            spool.discard()
        wrong = f"{spool.cause}, so the next start reads the prompts again" if spool.cause else wrong
    does("")
    prompts = _prompt_set(found, files)
    return replace(prompts, cached=f"{len(prompts):,} prompts are {there}" if there else "", uncached=wrong)


def _read(maker: PartMaker, files: Sequence[SourceFile], spool: Spool, origins: list[Span]) -> None:
    """Reads all files into the spool, and their spans into `origins`."""
    workers = min(cores(), MOST_WORKERS) if is_plain(maker.reader.tokenizer) else 1
    with Parts(maker, workers if workers > 1 else 0) as parts:
        for part in parts.of(_tasks(maker, files, origins)):
            spool.add(part)
            beat()
            does(f"{spool.rows:,} prompts are read")


def _tasks(maker: PartMaker, files: Sequence[SourceFile], origins: list[Span]) -> Iterator[Task]:
    """The records of all files. UserError: a source has none."""
    counts = {one.key: 0 for one in files}
    for place, (key, source, file) in enumerate(files):
        left = None if source.limit is None else source.limit - counts[key]
        if left != 0:
            file, before = replace(file, limit=left), counts[key]
            optional = None if maker.keep_records else [file.tools_field]
            unit, batches = read_records(file, key, maker.fields(file, key), optional)
            for batch in batches:
                counts[key] += len(batch)
                yield Task(file, key, unit, batch)
            origins.append(Span(place, unit, counts[key] - before))
        is_last = place + 1 == len(files) or files[place + 1].key != key
        if is_last and not counts[key]:
            raise UserError(source.origin, "no records", "at least one prompt")


def _prompt_set(found: Columns, files: Sequence[SourceFile]) -> PromptSet:
    arrays, origins = found.arrays, []
    for span in found.origins:
        key, _, file = files[span.file]
        origins.append(Origin(key, file.origin, span.unit, span.rows, file.tools_field))
    return PromptSet(
        tokens=arrays["tokens"],
        offsets=arrays[f"tokens{OFFSETS}"],
        references=texts_in(arrays, "references"),
        domains=Coded(found.domains, arrays["domains"]),
        texts=texts_in(arrays, "texts"),
        numbers=arrays["numbers"],
        records=texts_in(arrays, "records"),
        origins=tuple(origins),
        responses=responses_in(arrays),
    )


def check_lengths(prompts: PromptSet, most: int | None, why: str) -> None:
    """UserError: a prompt has no token, or more than `most`. It names the first such record. why: of the limit."""
    lengths = np.diff(prompts.offsets)
    wrongs = [(np.flatnonzero(lengths == 0), "at least one token")]
    if most is not None:
        wrongs.append((np.flatnonzero(lengths > most), f"at most {most}, {why}"))
    for wrong, expected in wrongs:
        if len(wrong):
            count = f"({len(wrong)} of {len(lengths)} prompts are like this)"
            raise UserError(prompts.where(wrong[0]), f"a prompt of {lengths[wrong[0]]} tokens {count}", expected)


def sample_seed(seed: int, epoch: int, prompt: int, sample: int) -> int:
    """The sampler's seed for one trajectory, 0 <= seed < 2^63; the same in a retry, after a restart, on any machine."""
    return hash_of(f"sample/{seed}/{epoch}/{prompt}/{sample}") >> 1


def requests(
    prompt_set: PromptSet,
    ids: np.ndarray,
    campaign_seed: int,
    *,
    judged: bool = False,
    most: int | None = None,
    max_turns: int | None = None,
) -> Requests:
    """Requests for the samples with these ids, [B, 3]: epoch, prompt, sample. judged: with references, for rewards. most,
    max_turns: limits of their own, of a response's tokens and of an episode's turns."""
    ids = np.asarray(ids, np.int64).reshape(-1, 3)
    rows = ids[:, 1]
    return Requests(
        ids=ids,
        seeds=np.array([sample_seed(campaign_seed, *row) for row in ids.tolist()], np.int64),
        prompt_tokens=ragged_rows(prompt_set.tokens, prompt_set.offsets, rows),
        prompt_offsets=offsets_of(prompt_set.lengths_of(rows)),
        references=tuple(prompt_set.references[row] for row in rows) if judged else (),
        asides=tuple(prompt_set.aside(row) for row in rows.tolist()) if judged or prompt_set.played else (),
        max_response_tokens=most,
        max_turns=max_turns,
    )


def copied(prompts: PromptSet, ids: np.ndarray, policy_version: int, most: int) -> tuple[RolloutCounts, Trajectories]:
    """The responses to the prompts of these ids [B, 3] as trajectories, cut at `most` tokens.

    Tokens get this policy version, since data does not become stale, and the behaviour log-prob 0.
    """
    responses, rows = prompts.responses, ids[:, 1]
    assert responses is not None
    whole = np.diff(responses.offsets)[rows]
    lengths = np.minimum(whole, most)
    offsets = offsets_of(lengths)
    places = np.repeat(responses.offsets[rows] - offsets[:-1], lengths) + np.arange(offsets[-1])
    cut = lengths < whole
    written = Trajectories(
        ids=np.asarray(ids, np.int64),
        prompt_tokens=ragged_rows(prompts.tokens, prompts.offsets, rows),
        prompt_offsets=offsets_of(prompts.lengths_of(rows)),
        response_tokens=responses.tokens[places],
        response_offsets=offsets,
        behaviour_logprobs=np.zeros(len(places), np.float32),
        policy_versions=np.full(len(places), policy_version, np.int32),
        finish_reasons=np.where(cut, FINISH_REASONS.index("length"), FINISH_REASONS.index("stop")).astype(np.uint8),
        trained=responses.trained[places],
    )
    versions, context = np.full(len(ids), policy_version, np.int32), lengths - written.trained_lengths
    return RolloutCounts(lengths, versions, cut, 0.0, context=tuple(context.tolist())), written
