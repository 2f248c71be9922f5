"""The fingerprint of prompts: xxh3-128 of their contents, whatever file they are read from."""

import xxhash

from actors.prompts.columns import ROWS, marked
from actors.prompts.prompt_set import PromptSet


def prompts_fingerprint(prompts: PromptSet, rows: range | None = None) -> str:
    """Of the prompts as the student reads them, in their order, with their references and domains. rows: of these alone.

    The same prompts in another file format have the same fingerprint; the number of a prompt then means the same.
    """
    digest = xxhash.xxh3_128()
    rows = range(len(prompts)) if rows is None else rows
    offsets = prompts.offsets[rows.start : rows.stop + 1]
    digest.update(prompts.tokens[offsets[0] : offsets[-1]].data)
    digest.update((offsets - offsets[0]).data)
    if prompts.responses is not None:
        bounds = prompts.responses.offsets[rows.start : rows.stop + 1]
        digest.update((bounds - bounds[0]).data)
        for values in (prompts.responses.tokens, prompts.responses.trained):
            digest.update(values[bounds[0] : bounds[-1]].data)
    for piece in prompts.references.marked(rows):
        digest.update(piece)
    domains = list(map(marked, prompts.domains.values))
    for begin in range(rows.start, rows.stop, ROWS):
        codes = prompts.domains.codes[begin : min(begin + ROWS, rows.stop)]
        digest.update(b"".join([domains[code] for code in codes.tolist()]))
    return digest.hexdigest()
