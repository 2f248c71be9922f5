"""Light campaigns that stop at a known place, so that a test can send signals there. Each runs in a process of its own."""

import itertools
import os
import pty
import select
import sys
import termios
import time
from fcntl import ioctl
from pathlib import Path
from typing import Any

import cluster.run
from cluster.state.checkpoints import Checkpoints
from learner.forward import Forward
from learner.learner import Learner
from tests import light_campaign


def tell_when_asked(folder: Path) -> None:
    """Makes the learner create `folder/asked` once it is asked to give up."""
    give_up = Learner.give_up

    def telling(self: Learner) -> None:
        give_up(self)
        (folder / "asked").touch()

    Learner.give_up = telling  # type: ignore[method-assign]


def write_at_once() -> None:
    """Makes the loop wait for each checkpoint: the learner tells that it is written between two updates only, and one of
    them waits for the test."""
    save_if_due = Checkpoints.save_if_due

    async def completely(self: Checkpoints, *arguments: Any) -> None:
        await save_if_due(self, *arguments)
        await self.finish()

    Checkpoints.save_if_due = completely  # type: ignore[method-assign]


def wait_at_update(number: int, folder: Path) -> None:
    """Makes update `number` of the learner create `folder/reached`, and wait for `folder/go`."""
    tell_when_asked(folder)
    write_at_once()
    update = Learner.update

    def waiting(self: Learner, *arguments: Any, **keywords: Any) -> Any:
        if self.policy_version + 1 == number:
            (folder / "reached").touch()
            wait_for(folder / "go")
        return update(self, *arguments, **keywords)

    Learner.update = waiting  # type: ignore[method-assign]


def wait_between_passes(number: int, folder: Path) -> None:
    """Makes update `number` wait in its second pass, which has a gradient of the first one."""
    tell_when_asked(folder)
    write_at_once()
    loss, passes = Forward.loss, itertools.count(1)

    def waiting(self: Forward, *arguments: Any, **keywords: Any) -> Any:
        if next(passes) == 8 * (number - 1) + 2:
            (folder / "reached").touch()
            wait_for(folder / "go")
        return loss(self, *arguments, **keywords)

    Forward.loss = waiting  # type: ignore[method-assign]


def wait_for(file: Path) -> None:
    while not file.exists():
        time.sleep(0.01)


def run_to_update(folder: Path, number: int, config: str) -> None:
    """`understudy run` that waits in an update."""
    wait_at_update(number, folder)
    light_campaign.run_command_here(folder, "run", config)


def run_to_second_pass(folder: Path, number: int, config: str) -> None:
    """`understudy run` that waits in an update, between two micro-batches of one trajectory each, of eight."""
    wait_between_passes(number, folder)
    light_campaign.run_command_here(folder, "run", config)


def run_to_start(folder: Path, config: str) -> None:
    """`understudy run` that waits while its actors start."""
    build = cluster.run.build_learner

    def waiting(*arguments: Any) -> Any:
        (folder / "reached").touch()
        wait_for(folder / "go")
        return build(*arguments)

    cluster.run.build_learner = waiting
    light_campaign.run_command_here(folder, "run", config)


def run_in_a_terminal(folder: Path, number: int, config: str) -> None:
    """`run_to_update` as the foreground process of a terminal, which closes when there is a file `folder/close`; `folder/closed` follows."""
    ours, theirs = pty.openpty()
    child = os.fork()
    if child:
        os.close(theirs)
        while not (folder / "close").exists():
            if select.select([ours], [], [], 0.01)[0]:  # a terminal that nobody reads takes 4 KiB, then blocks
                os.read(ours, 1 << 16)
        os.close(ours)
        (folder / "closed").touch()
        _, status = os.waitpid(child, 0)
        sys.exit(os.waitstatus_to_exitcode(status))
    os.setsid()
    os.close(ours)
    ioctl(theirs, termios.TIOCSCTTY, 0)
    for descriptor in (0, 1, 2):
        os.dup2(theirs, descriptor)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    run_to_update(folder, number, config)
