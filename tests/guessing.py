"""Environments for tests: `environment.name: tests.guessing:Guess`, and some that go wrong."""

import asyncio
import os
from pathlib import Path
from typing import Any

from actors.environment.base import Episode


class Guess:
    """Answers every turn but the last of `turns` with a word, and then gives a reward that depends on what was written.

    fails: what happens in the first `times` attempts at an episode whose prompt's number is divisible by `each`: `raises`,
    `hangs`, `nonsense`, `dies` (the process); `all`: the first three in turn. log: a file that gets a line for each reset.
    """

    def __init__(
        self, turns: int = 3, fails: str = "", times: int = 1, each: int = 2, log: str = "", own_prompt: bool = False
    ):
        self.turns, self.fails, self.times, self.each = turns, fails, times, each
        self.log, self.own_prompt = log, own_prompt

    async def reset(self, record: dict[str, Any], episode: Episode) -> Any:
        self.written: list[str] = []
        self.fault = self.fails if episode.id.prompt % self.each == 0 and episode.attempt < self.times else ""
        if self.fault == "all":
            self.fault = ("raises", "hangs", "nonsense")[episode.id.prompt % 3]
        if self.log:
            with Path(self.log).open("a") as file:
                file.write(f"{episode.id} {episode.attempt} {episode.seed} {os.getpid()}\n")
        return [{"role": "user", "content": f"Now {record['prompt']}"}] if self.own_prompt else None

    async def step(self, message: dict[str, Any]) -> Any:
        self.written.append(message["content"])
        if self.fault and len(self.written) == 2:
            if self.fault == "hangs":
                await asyncio.sleep(3600)
            if self.fault == "dies":
                os._exit(9)
            if self.fault == "nonsense":
                return "no", "tuple of three", "things", 4
            raise ValueError("the game is broken")
        done = len(self.written) == self.turns
        return f"more{len(self.written)}", done, (len(self.written[-1]) % 2) / 2 if done else None


class Asks(Guess):
    """The same, which asks a server at `socket`, the path of a Unix socket, in its second step."""

    def __init__(self, socket: str):
        super().__init__()
        self.socket = socket

    async def step(self, message: dict[str, Any]) -> Any:
        if len(self.written) == 1:
            reader, writer = await asyncio.open_unix_connection(self.socket)
            answer = await reader.read()
            writer.close()
            if answer != b"here":
                raise ConnectionResetError("no answer")
        return await super().step(message)
