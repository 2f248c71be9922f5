"""The start of a campaign with many prompts: seconds, memory, and the first request. Prints a Markdown table.

    python -m benchmarks.prompts [--prompts 10000000] [--format jsonl]

A process of its own reads the prompts as a campaign does (cluster/inputs.py), fingerprints them, and makes the requests of one
group. Prompts are sums, read by the demo's student; the file is written before.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LINES = 100_000
"""Prompts that are written at a time."""


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
    from actors.data.prompt_order import PromptOrder
    from actors.data.prompts import requests
    from cluster.config_file import load_config
    from cluster.inputs import read_inputs
    from cluster.state.same_inputs import fingerprints

    overrides = [f"prompts.path={path}", "evaluation.prompts.limit=16"]
    config = load_config(ROOT / "configs" / "quickstart.yaml", overrides)
    base = peak()
    began, cpu = time.perf_counter(), time.process_time()
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
        "request": done - ordered, "processor": time.process_time() - cpu, "base": base, "peak": peak(),
    })  # fmt: skip


def peak() -> float:
    """The most memory of this process, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=10_000_000)
    parser.add_argument("--format", choices=["jsonl", "parquet"], default="jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"prompts.{options.format}")
        write(path, options.prompts)
        print(json.dumps({"file": path.stat().st_size}))
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("spawn").Process(target=start, args=(path, there))
        process.start()
        found = here.recv()
        process.join()
    print(
        "| prompts | read, s | fingerprint | order | processor s | most memory above an idle process | first request, ms |"
    )
    print("|---|---|---|---|---|---|---|")
    print(
        f"| {found['prompts']:,} | {found['read']:.1f} | {found['fingerprint']:.1f} | {found['order']:.1f} "
        f"| {found['processor']:.1f} | {found['peak'] - found['base']:.0f} MiB | {1e3 * found['request']:.2f} |"
    )


if __name__ == "__main__":
    main()
