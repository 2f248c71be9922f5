"""The start of a campaign with many prompts: seconds, memory, and the first request. Prints Markdown tables.

    python -m benchmarks.prompts [--prompts 10000000] [--format jsonl]

A process of its own reads the prompts as a campaign does (cluster/inputs.py), fingerprints them, and makes the requests of one
group: a first time, and a second one, which finds the columns of the first in the cache. Prompts are sums, read by the demo's
student; the file is written before, and the cache is beside it. The last table has what JSON, chat template and tokenizer alone
take for some of the prompts, on one core: no reading in Python takes less.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from actors.prompts.cache import VARIABLE

ROOT = Path(__file__).resolve().parents[1]
LINES = 100_000
"""Prompts that are written at a time."""
COLUMNS = (
    "| start | prompts | read, s | fingerprint | order | processor s | in the campaign's process "
    "| memory above an idle process, MiB | of a helping process | first request, ms |"
)
SAMPLE = 20_000
"""Records that the libraries alone read, for the floor."""


def write(path: Path, prompts: int) -> None:
    """Different sums with their answers."""
    if path.suffix == ".jsonl":
        with path.open("w") as file:
            for start in range(0, prompts, LINES):
                pairs = (divmod(number, 10_000) for number in range(start, min(start + LINES, prompts)))
                file.writelines(f'{{"prompt": "{a}+{b}=", "answer": "{a + b}"}}\n' for a, b in pairs)
        return
    import pyarrow
    from pyarrow import parquet

    schema = pyarrow.schema([("prompt", pyarrow.string()), ("answer", pyarrow.string())])
    with parquet.ParquetWriter(path, schema) as file:
        for start in range(0, prompts, LINES):
            pairs = [divmod(number, 10_000) for number in range(start, min(start + LINES, prompts))]
            columns = [[f"{a}+{b}=" for a, b in pairs], [str(a + b) for a, b in pairs]]
            file.write_table(pyarrow.table(columns, schema=schema))


def start(path: Path, answer: Any) -> None:
    """Reads and asks; sends {what: seconds or MiB}."""
    from actors.prompts.order import PromptOrder
    from actors.prompts.prompt_set import requests
    from cluster.config_file import load_config
    from cluster.inputs import read_inputs
    from cluster.state.same_inputs import fingerprints

    overrides = [f"prompts.path={path}", "evaluation.prompts.limit=16"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    base = peak()
    began, cpu, own = time.perf_counter(), processor_seconds(), time.process_time()
    inputs = read_inputs(config)
    read = time.perf_counter()
    fingerprints(config, inputs.prompts, inputs.held_out)
    printed = time.perf_counter()
    order = PromptOrder(config.seed, inputs.prompts.counts, [None])
    order.id_at(0)
    ordered = time.perf_counter()
    ids = [(*order.id_at(1), sample) for sample in range(8)]
    asked = requests(inputs.prompts, ids, config.seed)
    done = time.perf_counter()
    assert len(asked.ids) == 8
    answer.send({
        "prompts": len(inputs.prompts), "read": read - began, "fingerprint": printed - read, "order": ordered - printed,
        "request": done - ordered, "processor": processor_seconds() - cpu, "own": time.process_time() - own, "base": base, "peak": peak(),
        "worker": peak(resource.RUSAGE_CHILDREN),
    })  # fmt: skip


def floor(path: Path, answer: Any) -> None:
    """Sends {what: seconds for each record}: what the libraries take by themselves, for SAMPLE records."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from actors.data.tokenizer import load_tokenizer
    from actors.prompts.record_batches import DECODER

    tokenizer: Any = load_tokenizer(str(ROOT / "examples" / "addition" / "student"), False, "student.model")
    with path.open(encoding="utf-8") as file:
        lines = list(islice(file, SAMPLE))
    began = time.process_time()
    records = [DECODER.decode(line) for line in lines]
    decoded = time.process_time()
    template, names = _compile_jinja_template(tokenizer.chat_template), tokenizer.special_tokens_map
    chats = [[{"role": "user", "content": record["prompt"]}] for record in records]
    texts = [template.render(messages=chat, add_generation_prompt=True, **names) for chat in chats]
    rendered = time.process_time()
    ids = [one.ids for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
    done = time.process_time()
    assert len(ids) == len(records)
    seconds = {"JSON": decoded - began, "chat template": rendered - decoded, "tokenizer": done - rendered}
    answer.send({what: value / len(records) for what, value in seconds.items()})


def peak(whose: int = resource.RUSAGE_SELF) -> float:
    """The most memory of this process, or of one that it has started, MiB."""
    return resource.getrusage(whose).ru_maxrss / 1024


def processor_seconds() -> float:
    """Of this process, and of those that it has started and that have ended."""
    own = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in own)


def apart(function: Any, path: Path) -> dict[str, float]:
    """What the function sends from a process of its own."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=function, args=(path, there))
    process.start()
    there.close()
    found = here.recv()
    process.join()
    return found


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ[VARIABLE] = folder
        path = Path(folder, f"prompts.{options.format}")
        write(path, options.prompts)
        print(json.dumps({"file": path.stat().st_size}))
        print(f"{COLUMNS}\n{'|---' * 10}|")
        for name in ("first", "second"):
            found = apart(start, path)
            print(
                f"| {name} | {found['prompts']:,} | {found['read']:.1f} | {found['fingerprint']:.1f} | {found['order']:.1f} "
                f"| {found['processor']:.1f} | {found['own']:.1f} | {found['peak'] - found['base']:.0f} | {found['worker']:.0f} "
                f"| {1e3 * found['request']:.2f} |",
                flush=True,
            )
        if options.format == "jsonl":
            alone = apart(floor, path)
            print(f"| {' | '.join(alone)} | alone, processor s for {options.prompts:,} |\n{'|---' * (len(alone) + 1)}|")
            each = " | ".join(f"{1e6 * value:.1f} us" for value in alone.values())
            print(f"| {each} | {options.prompts * sum(alone.values()):.0f} |")


if __name__ == "__main__":
    main()
