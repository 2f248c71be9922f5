"""Kills campaigns at random moments, runs them again, and compares what is left with campaigns that nothing disturbed.

    python benchmarks/resume.py [--kills 40] [--real 0] [--seed 0]

Light campaigns run in one process, with the real loop, learner, teacher and files (tests/light_campaign.py), and are
killed, all of the process at once (SIGKILL), at a random operation on their files, `--kills` times in synchronous and as
often in asynchronous mode; `--real`
more kills hit a driver with Ray and vLLM. Synchronous: the checkpoints (weights, optimiser, state), metrics but for
times, the ledger and the kept trajectories have the same hashes. Asynchronous: the ledger adds up, each sample trained
once. Prints one JSON object; exit status 1 where anything differs.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.light_campaign import (  # noqa: E402
    assert_ledger_adds_up,
    configuration,
    fingerprint,
    finish,
    make_folder,
    run_with_kills,
    start,
)

UPDATES, SIZE = 24, 8
PIPELINE = {"updates": UPDATES, "prompts_per_update": 4, "samples_per_prompt": 2}


def light(folder: Path, kills: int, max_staleness: int, draw: random.Random) -> dict[str, object]:
    """Campaigns one after the other until so many kills have hit."""
    mode = f"light-{max_staleness}"
    calm = configuration(folder, f"{mode}-calm", pipeline={**PIPELINE, "max_staleness": max_staleness})
    seconds = finish(start(calm), calm)
    undisturbed = fingerprint(folder / "runs" / f"{mode}-calm")
    hits, campaigns, differing = 0, 0, 0
    while hits < kills:
        name = f"{mode}-{campaigns}"
        config = configuration(folder, name, pipeline={**PIPELINE, "max_staleness": max_staleness})
        hits += run_with_kills(config, min(8, kills - hits), draw)
        assert_ledger_adds_up(folder / "runs" / name, UPDATES, SIZE, max_staleness)
        if max_staleness == 0:
            differing += fingerprint(folder / "runs" / name) != undisturbed
        campaigns += 1
    found: dict[str, object] = {"kills": hits, "campaigns": campaigns, "seconds_undisturbed": round(seconds, 2)}
    return found | (
        {"campaigns_that_differ": differing, "files_compared": len(undisturbed)} if not max_staleness else {}
    )


def real(folder: Path, kills: int, draw: random.Random) -> dict[str, object]:
    """The same with Ray and vLLM, in processes of their own; kills fall between the first seconds and the end."""

    def begin(name: str) -> subprocess.Popen[bytes]:
        light = configuration(
            folder,
            name,
            rollout={"cpus_per_replica": 0.2, "engine": {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8}},
            learner={"cpus_per_replica": 0.2},
            pipeline=PIPELINE,
        )
        command = [sys.executable, "-m", "cluster", "run", str(light), "teachers.default.cpus_per_replica=0.2"]
        return subprocess.Popen(
            [*command, "ray.object_store_mebibytes=100"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )

    def end(process: subprocess.Popen[bytes]) -> None:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]

    started = time.monotonic()
    end(begin("real-calm"))
    seconds = time.monotonic() - started
    hits = 0
    while hits < kills:
        process = begin("real-killed")
        try:
            process.communicate(timeout=draw.uniform(0.3, 1.0) * seconds)
            assert process.returncode == 0
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            hits += 1
    end(begin("real-killed"))
    calm, killed = (fingerprint(folder / "runs" / name) for name in ("real-calm", "real-killed"))
    assert_ledger_adds_up(folder / "runs" / "real-killed", UPDATES, SIZE, 0)
    return {
        "kills": hits,
        "files_compared": len(calm),
        "files_that_differ": sum(calm[k] != killed.get(k) for k in calm),
    }


def main() -> None:
    """Prints the result; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40, help="in each of the two light modes")
    parser.add_argument("--real", type=int, default=0, help="of drivers with Ray and vLLM")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = make_folder(Path(temporary))
        result = {
            "synchronous": light(folder, options.kills, 0, draw),
            "asynchronous": light(folder, options.kills, 1, draw),
        }
        if options.real:
            result["real"] = real(folder, options.real, draw)
    print(json.dumps(result, indent=2))
    sys.exit(result["synchronous"]["campaigns_that_differ"] or result.get("real", {}).get("files_that_differ", 0) > 0)


if __name__ == "__main__":
    main()
