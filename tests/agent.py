"""A program that plays an episode, for tests: `environment.command: [python, tests/agent.py]`. Standard library only.

It answers every turn but the last of `turns` with a word, and then writes a reward that depends on what the student wrote.
what: what it does instead in its first `times` attempts at an episode whose prompt's number is divisible by `each`.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def ask(messages: list[dict]) -> dict:
    """The student's turn after these messages."""
    body = json.dumps({"model": "any", "messages": messages}).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"}
    request = urllib.request.Request(f"{os.environ['OPENAI_BASE_URL']}/chat/completions", body, headers)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as answer:
        return json.load(answer)["choices"][0]["message"]


def sleep_for_ever() -> None:
    while True:
        time.sleep(1000)


def disturb(what: str, log: str) -> None:
    """What goes wrong after the first turn."""
    if what == "raises":
        raise ValueError(f"the program is broken, {os.environ['OPENAI_API_KEY']}")
    if what == "hangs":
        sleep_for_ever()
    if what == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if what in ("forks", "deaf"):
        child = subprocess.Popen(["sleep", "1000"], stderr=subprocess.DEVNULL)
        Path(log).write_text(f"{os.getpid()} {child.pid}")
    if what == "deaf":
        sleep_for_ever()
    if what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "nonsense":
        Path(os.environ["UNDERSTUDY_REWARD"]).write_text("much")
    if what == "pipe":
        os.mkfifo(os.environ["UNDERSTUDY_REWARD"])
    if what == "key":
        Path(os.environ["UNDERSTUDY_REWARD"]).write_text(os.environ["OPENAI_API_KEY"])
    if what in ("forks", "nonsense", "ends", "pipe", "key"):
        sys.exit(0)


def branch(messages: list[dict], turn: int) -> None:
    """A conversation of its own, and then the same question twice at once, after the last turn."""
    ask([{"role": "user", "content": f"sub{turn}"}])
    further = [*messages, {"role": "user", "content": f"again{turn}"}]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(ask, [further, further]))


def main() -> None:
    """Plays."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--what", default="")
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--each", type=int, default=1)
    parser.add_argument("--log", default="")
    parser.add_argument("--branches", action="store_true", help="it asks more than one conversation would")
    options = parser.parse_args()
    record, episode = json.loads(os.environ["UNDERSTUDY_RECORD"]), os.environ["UNDERSTUDY_EPISODE"]
    disturbed = int(os.environ["UNDERSTUDY_ATTEMPT"]) < options.times and not int(episode.split("/")[1]) % options.each
    if options.what == "silent" and disturbed:
        print("nothing to ask", file=sys.stderr)
        return
    messages = [{"role": "user", "content": record["prompt"]}]
    for turn in range(1, options.turns + 1):
        messages.append(ask(messages))
        if turn == 1 and disturbed:
            disturb(options.what, options.log)
        if options.branches:
            branch(messages, turn)
        messages.append({"role": "user", "content": f"more{turn}"})
    Path(os.environ["UNDERSTUDY_REWARD"]).write_text(str(len(messages[-2]["content"]) % 2 / 2))


if __name__ == "__main__":
    main()
