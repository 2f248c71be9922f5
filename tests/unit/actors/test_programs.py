"""Programs that play episodes: what they are given, what becomes of them, and that none outlives its episode."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from actors.config import EnvironmentConfig, PromptsConfig, SamplingConfig
from actors.environment import program
from actors.environment.actor import EnvironmentActor
from actors.environment.base import Answer, Begun, Episode, Follows, Turn
from actors.environment.trial import try_environment
from actors.errors import UserError
from actors.trajectory import TrajectoryId
from tests.documented import ROOT
from tests.processes import command_of
from tests.tiny_models import make_tiny_tokenizer
from tests.waiting import until

EPISODE = Episode(TrajectoryId(0, 6, 2), 7, 0)
TURN = Turn(["x"], [-1.0], 2, 5, 3)


def actor_of(*command: str, folder: Path = ROOT, **settings: Any) -> EnvironmentActor:
    return EnvironmentActor(EnvironmentConfig(command=list(command), **settings), None, str(folder))


async def played(actor: EnvironmentActor, episode: Episode = EPISODE, turns: int = 9, close: bool = True) -> list[Any]:
    """What reset and the steps answer, up to the end of the episode."""
    answers: list[Any] = [await actor.reset("a", episode, {"prompt": "1+1="})]
    while len(answers) <= turns and not answers[-1].error and not getattr(answers[-1], "done", False):
        answers.append(await actor.step("a", {"role": "assistant", "content": len(answers) * "x"}, TURN))
    if close:
        await actor.close("a")
        await asyncio.gather(*actor._closing)
    return answers


def play(*command: str, episode: Episode = EPISODE, **settings: Any) -> list[Any]:
    return asyncio.run(played(actor_of(*command, **settings), episode))


def agent(what: str = "", *more: str, **settings: Any) -> list[Any]:
    return play("python", "tests/agent.py", "--what", what, *more, **settings)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_a_program_plays_an_episode() -> None:
    def more(turn: int) -> Answer:
        return Answer([{"role": "user", "content": f"more{turn}"}], follows=Follows(turn - 1, []))

    begun = Begun([{"role": "user", "content": "1+1="}], [])
    assert agent() == [begun, more(1), more(2), Answer([], True, 0.5)]


def test_a_program_holds_several_conversations() -> None:
    """Each turn of the first is followed by a question of its own, and by two that go on from the same turn."""
    found = agent("", "--branches", "--turns", "2")
    told = [(one.follows.turn, one.messages[0]["content"]) for one in found[1:-1]]
    assert told == [
        (None, "sub1"),
        (0, "again1"),
        (0, "again1"),
        (0, "more1"),
        (None, "sub2"),
        (4, "again2"),
        (4, "again2"),
    ]
    assert found[-1].done and not found[-1].error


def test_a_program_is_given_its_episode_and_not_the_token_of_the_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    monkeypatch.setenv("NO_PROXY", "localhost")
    (tmp_path / "tell.py").write_text(
        "import json, os, sys\nopen('told', 'w').write(json.dumps([sys.executable, os.getpgid(0), dict(os.environ)]))\n"
    )
    [begun] = play("python", "tell.py", folder=tmp_path, episode=EPISODE._replace(attempt=2))
    assert begun.error == "reset failed: the program has ended without a request"
    executable, group, given = json.loads((tmp_path / "told").read_text())
    assert Path(executable) == Path(sys.executable) and group != os.getpgid(0)
    assert not [name for name in given if name.startswith("RAY_")]
    own = {name: given[name] for name in given if name.startswith("UNDERSTUDY_")}
    reward = Path(own.pop("UNDERSTUDY_REWARD"))
    assert own == {
        "UNDERSTUDY_RECORD": '{"prompt": "1+1="}',
        "UNDERSTUDY_EPISODE": "0/6/2",
        "UNDERSTUDY_SEED": "7",
        "UNDERSTUDY_ATTEMPT": "2",
    }
    assert given["OPENAI_BASE_URL"].startswith("http://127.0.0.1:") and given["OPENAI_API_KEY"].startswith("sk-")
    assert given["NO_PROXY"] == "localhost,127.0.0.1" and given["no_proxy"].endswith("127.0.0.1")
    assert reward.parent.stat().st_mode & 0o777 == 0o700 and not reward.exists()


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("raises", "ended with exit status 1: …"),
        ("raises", "ValueError: the program is broken, …"),  # instead of its key
        ("silent", "the program has ended without a request: nothing to ask"),
        ("killed", "the program has ended with signal 9"),
        ("nonsense", "the program has written 'much' to UNDERSTUDY_REWARD, expected a number"),
        ("pipe", "something else than a file of UNDERSTUDY_REWARD"),
        ("key", "the program has written '…' to UNDERSTUDY_REWARD"),
    ],
)
def test_a_program_that_fails_says_why_and_plays_the_next_attempt(what: str, told: str) -> None:
    error = agent(what)[-1].error
    assert told in error and "sk-" not in error
    assert agent(what, episode=EPISODE._replace(attempt=1))[-1] == Answer([], True, 0.5)


@pytest.mark.parametrize("turns", [0, 1])
def test_a_program_says_by_its_exit_status_that_what_it_needs_is_away(turns: int) -> None:
    for status, away in ((os.EX_TEMPFAIL, True), (os.EX_UNAVAILABLE, False)):
        ends = f"echo the sandbox is away >&2; exit {status}"
        found = play("sh", "-c", f"python tests/agent.py --turns 1; {ends}" if turns else ends)
        assert len(found) == 1 + turns and found[-1].away == away
        assert f"failed: the program has ended with exit status {status}: the sandbox is away" in found[-1].error


def test_one_that_hangs_is_told_by_the_limit_of_a_step() -> None:
    script = "echo it asks a server >&2; exec python tests/agent.py --what hangs"
    actor = actor_of("sh", "-c", script, step_timeout_seconds=60)

    async def hang() -> None:
        await played(actor, turns=0, close=False)
        actor._config.step_timeout_seconds = 0.05
        answer = await actor.step("a", {"role": "assistant", "content": "x"}, TURN)
        assert answer.error.startswith(
            "step gave no answer within 0.05 s (environment.step_timeout_seconds); the program"
        )
        assert answer.error.endswith(" still runs, and standard error ends with: it asks a server")
        actor._config.step_timeout_seconds = 60
        process = actor._open["a"][0]._process
        await actor.close("a")
        assert process.returncode == -signal.SIGTERM

    asyncio.run(hang())


def test_what_a_program_has_started_ends_with_it(tmp_path: Path) -> None:
    log = tmp_path / "pids"
    assert agent("forks", "--log", str(log))[-1] == Answer([], True, None)
    until(lambda: all(map(is_gone, map(int, log.read_text().split()))), "the end of what it has started")


def test_one_that_ignores_the_request_to_end_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, actor = (
        tmp_path / "pids",
        actor_of("python", "tests/agent.py", "--what", "deaf", "--log", str(tmp_path / "pids")),
    )
    monkeypatch.setattr(program, "GRACE_SECONDS", 0.01)

    async def hang() -> None:
        await played(actor, turns=0, close=False)
        step = asyncio.ensure_future(actor.step("a", {"role": "assistant", "content": "x"}, TURN))
        while not log.exists() or len(log.read_text().split()) < 2:
            await asyncio.sleep(0.01)
        await actor.close("a")
        assert (await step).error == "step was given up"

    asyncio.run(hang())
    until(lambda: all(map(is_gone, map(int, log.read_text().split()))), "the end of what it has started")


DIES = """
import asyncio, sys
from actors.config import EnvironmentConfig
from actors.environment.actor import EnvironmentActor
from actors.environment.base import Episode
actor = EnvironmentActor(EnvironmentConfig(command=["sh", "-c", sys.argv[1]], step_timeout_seconds=600))
asyncio.run(actor.reset("a", Episode((0, 0, 0), 7), {}))
"""


@pytest.mark.parametrize("with_children", [False, True])
def test_programs_end_with_the_process_that_has_started_them(with_children: bool, tmp_path: Path) -> None:
    """Also when it is killed, which it cannot notice; or with all its children, as actors are."""
    pids = tmp_path / "pids"
    script = f"sleep 1000 & echo $$ $! $PPID $UNDERSTUDY_REWARD > {pids}.new; mv {pids}.new {pids}; wait"
    with subprocess.Popen(
        [sys.executable, "-c", DIES, script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as process:
        until(pids.exists, "a running program", lambda: process.poll() is None)
        *programs, parent, reward = pids.read_text().split()
        assert int(parent) == process.pid and not any(map(is_gone, map(int, programs)))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        for child in children if with_children else ():
            child.kill()
    until(lambda: all(map(is_gone, map(int, programs))), "the end of its programs")
    until(lambda: not Path(reward).parent.exists(), "the end of the folder for rewards")


def test_nothing_of_an_episode_is_left_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a key, nor a reward, nor an open file: also where a process of another group goes on with standard error."""
    leaves = f"setsid sleep 1000 & echo $! >> {tmp_path}/pids; exec python tests/agent.py"
    actor, process, told = actor_of("sh", "-c", leaves), psutil.Process(), []
    programs: Any = actor._make

    async def episodes() -> None:
        await played(actor)
        before = process.num_fds()
        tell = programs._tell
        monkeypatch.setattr(programs, "_tell", lambda line: (told.append(line), tell(line)))
        for _ in range(3):
            assert (await played(actor))[-1] == Answer([], True, 0.5)
        for _ in range(1000):  # connections end soon
            if process.num_fds() <= before:
                break
            await asyncio.sleep(0.01)
        assert process.num_fds() <= before

    try:
        asyncio.run(episodes())
    finally:
        for pid in (tmp_path / "pids").read_text().split():
            os.kill(int(pid), signal.SIGKILL)
    begun, ended = told[::2], told[1::2]
    assert len(begun) == 3 and [f"-{line[1:]}" for line in begun] == ended and all(line[0] == "+" for line in begun)
    assert not programs.endpoint._episodes and not list(Path(programs._rewards).iterdir())
    [leash] = [one.pid for one in psutil.process_iter(["cmdline"]) if programs._rewards in (one.info["cmdline"] or [])]
    assert os.getsid(leash) != os.getsid(0), "it does not get the signals of this process's terminal"


def test_an_episode_that_is_given_up_while_it_begins_leaves_no_program() -> None:
    async def begin(steps: int) -> None:
        reset = asyncio.create_task(actor.reset("a", EPISODE, {"prompt": "1"}))
        for _ in range(steps):
            await asyncio.sleep(0)
        await actor.close("a")
        assert (await reset).error

    async def all_moments() -> None:
        for steps in range(1, 12):  # the last ones after the program's start
            await begin(steps)

    actor = actor_of("python", "tests/agent.py", "--what", "hangs", "--log", str(os.getpid()))
    programs: Any = actor._make
    asyncio.run(all_moments())
    assert not programs.endpoint._episodes and not list(Path(programs._rewards).iterdir())

    def left() -> list[psutil.Process]:
        return [one for one in psutil.process_iter() if command_of(one)[-2:] == ["--log", str(os.getpid())]]

    until(lambda: not left(), "the end of every program")


def test_the_end_of_a_long_standard_error_is_told() -> None:
    script = "import sys; sys.stderr.write(9999 * 'x '); sys.stderr.flush(); sys.exit('the cause')"
    [begun] = play("python", "-c", script)
    assert begun.error.endswith("x x x the cause") and len(begun.error) < 400


def test_a_request_may_say_what_the_campaign_samples_with() -> None:
    config = EnvironmentConfig(command=["true"])
    programs: Any = EnvironmentActor(config, SamplingConfig(temperature=0.5), str(ROOT))._make
    assert programs.endpoint._sampling.temperature == 0.5


def test_an_episode_that_is_never_closed_ends_after_its_time() -> None:
    async def forget() -> None:
        actor = actor_of("python", "tests/agent.py", "--what", "hangs")
        await played(actor, turns=0, close=False)
        own, _ = actor._open["a"]
        actor._open["a"] = own, 0.0
        await actor.reset("b", EPISODE, {"prompt": "1"})
        assert await actor.status() == {"episodes": 1}
        await own._process.wait()
        await actor.close("b")

    asyncio.run(forget())


def test_an_actor_hosts_so_many_episodes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def host() -> None:
        actor = actor_of("python", "tests/agent.py", "--what", "hangs", episodes_per_replica=2)
        ended, waits = asyncio.Event(), asyncio.Event()

        async def close(self: program.Program) -> None:
            waits.set()
            await ended.wait()
            await end(self)

        end = program.Program.close
        monkeypatch.setattr(program.Program, "close", close)
        assert [await actor.enter(key) for key in "abc"] == [True, True, False]
        assert not (await actor.reset("a", EPISODE, {"prompt": "1+1="})).error
        assert not await actor.enter("c")
        closing = asyncio.ensure_future(actor.close("a"))
        await waits.wait()
        assert not await actor.enter("c"), "the program of the first has not ended"
        ended.set()
        await closing
        assert await actor.enter("c") and not await actor.enter("d")
        await actor.close("b")  # it has never begun
        assert await actor.enter("d")

    asyncio.run(host())


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("missing-program", "which is not there"),
        ("/missing.sh", "which is not there"),
        ("./missing.sh", f"which is not in {ROOT}"),
        ("tests/agent.py", "a file that may not be executed"),
        ("Makefile", "which is not in PATH"),
    ],
)
def test_a_program_that_is_not_there_is_refused(command: str, told: str) -> None:
    with pytest.raises(UserError, match=f"environment.command: found {command}, {told}"):
        actor_of(command)


def test_an_address_that_is_not_this_machines_is_told() -> None:
    async def begin() -> Any:
        actor = EnvironmentActor(EnvironmentConfig(command=["true"], listen="network"), None, str(ROOT), "192.0.2.1")
        return await actor.reset("a", EPISODE, {"prompt": "1"})

    assert "the endpoint cannot listen at 192.0.2.1 (environment.listen): " in asyncio.run(begin()).error


def test_a_script_without_its_interpreter_is_told(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("#!/missing/interpreter\n")
    script.chmod(0o755)
    [begun] = play(str(script))
    assert "the program cannot be started: No such file or directory; or its interpreter is not there" in begun.error


def test_a_record_that_no_variable_holds_is_told() -> None:
    async def begin() -> Any:
        return await actor_of("true").reset("a", EPISODE, {"prompt": 2**17 * "1"})

    assert "the record has 131086 bytes" in asyncio.run(begin()).error


def test_a_program_is_tried_with_the_first_record(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    prompts, tokenizer = PromptsConfig(path=str(tmp_path / "train.jsonl")), make_tiny_tokenizer()
    config = EnvironmentConfig(command=["python", str(ROOT / "tests/agent.py")])
    found = try_environment(config, prompts, tokenizer, [1])
    assert found.startswith("python ") and found.endswith("tests/agent.py, first prompt: 7 tokens")
    config.command[1] = "missing.py"
    with pytest.raises(
        UserError, match=r"environment\.command: found python missing\.py, whose reset failed: .*can't open file"
    ):
        try_environment(config, prompts, tokenizer, [1])
