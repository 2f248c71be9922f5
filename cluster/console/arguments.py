"""The commands and their arguments: what can be typed, and what its help says. Errors name what was perhaps meant."""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from cluster.console.runs import RUN_HELP


class HelpfulParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors suggest the nearest command, option or choice."""

    def error(self, message: str) -> NoReturn:
        """Prints usage, the message and a suggestion, and ends with status 2."""
        super().error(message + self._meant(message))

    def _meant(self, message: str) -> str:
        if found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message):
            wrong, known = [found[1]], re.findall(r"[\w.-]+", found[2])
        elif message.startswith("unrecognized arguments: "):
            wrong = [word.partition("=")[0] for word in message.split()[2:] if word.startswith("-")]
            known = sorted(set(re.findall(r"--[\w-]+", self.format_help())))
        else:
            return ""
        nearest = [near for word in wrong for near in difflib.get_close_matches(word, known, n=1)]
        return f"; did you mean {' '.join(nearest)}?" if nearest else ""


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands. What it finds has the command's name as `command`, and the command's own parser as `parser`."""
    parser = HelpfulParser(prog="understudy", description="On-policy distillation of language models on Ray.")
    parser.add_argument("--version", action=_Version, help="print the versions of everything that a campaign runs with")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=name, parser=sub)
        return sub

    _add_commands_of_a_configuration(command)
    _add_evaluate(command)
    _add_score(command)
    _add_commands_of_a_run(command)
    return parser


class _Version(argparse.Action):
    """Prints the versions and ends; reads them only when it is asked."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None):
        super().__init__(option_strings, dest, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from cluster.records.software import software

        for name, found in software().items():
            print(f"{name.replace('_', ' ')}: {found}")
        parser.exit()


Command = Callable[[str, str], argparse.ArgumentParser]
"""(name, help) -> the parser of one command."""


def _add_commands_of_a_configuration(command: Command) -> None:
    def configured(name: str, text: str, example: str, **how: Any) -> argparse.ArgumentParser:
        sub = command(name, text)
        sub.add_argument("config", help="YAML file", **how)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=example)
        return sub

    example = "e.g. rollout.replicas=2"
    run = configured("run", "run a campaign, or resume it where it stopped", example, nargs="?")
    run.add_argument(
        "--resume", nargs="?", const="", metavar="RUN", help=f"resume a run; no CONFIG, only key=value. RUN: {RUN_HELP}"
    )
    run.add_argument(
        "--resume-from", metavar="STEP", help="resume from this checkpoint (default: the newest whole one)"
    )
    run.add_argument(
        "--allow-change",
        action="append",
        default=[],
        metavar="KEY",
        help="go on with another value of this key or section, or other contents (docs/changes.md); repeats",
    )
    check = configured("check", "check configuration, models, prompts and cluster before a campaign starts", example)
    check.add_argument(
        "--offline", action="store_true", help="ask no cluster, and skip files that are not on this machine"
    )
    submit = configured("submit", "run a campaign as a job on a Ray cluster", example)
    submit.add_argument("--address", help="job server of the cluster (default: $RAY_API_SERVER_ADDRESS, else local)")
    submit.add_argument("--env", action="append", default=[], metavar="NAME[=value]", help="set in the job; repeats")
    submit.add_argument("--follow", action="store_true", help="show the job's output until it ends")
    plan = configured("plan", "predict throughput and recommend how many actors of each role to start", example)
    plan.add_argument("--gpus", type=float, metavar="N", help="recommend numbers of actors for this many GPUs")
    source = plan.add_mutually_exclusive_group()
    source.add_argument(
        "--run", metavar="RUN", help="predict from this run, finished or running (default: the campaign's own)"
    )
    source.add_argument("--calibrate", action="store_true", help="run and measure a few updates first")
    source.add_argument("--gpu", metavar="NAME", help="predict from data sheets, e.g. H100; nothing is run")
    plan.add_argument(
        "--prompt-tokens", type=float, metavar="N", default=256.0, help="with --gpu: mean length of a prompt"
    )
    plan.add_argument(
        "--response-tokens",
        type=float,
        metavar="N",
        help="with --gpu: mean length (default: half of max_response_tokens)",
    )
    text = "run one task under several methods and seeds, and compare them"
    versus = configured("compare", text, "rl:key=value applies to that method only")
    versus.add_argument(
        "--methods", default="opd,rl,sft", help="some of opd, sft, sft_then_opd, opd_reward, rl (default opd,rl,sft)"
    )
    versus.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    versus.add_argument("--target", type=float, default=0.95, help="share of the teacher's accuracy (default 0.95)")
    versus.add_argument("--output", type=Path, help="page to write (default: <output_dir>/<name>-comparison.html)")


def _add_evaluate(command: Command) -> None:
    evaluate = command("evaluate", "evaluate models on the held-out prompts of a configuration, without training")
    evaluate.add_argument(
        "sources",
        nargs="+",
        metavar="MODEL_OR_RUN ... CONFIG [key=value ...]",
        help="model directories, hub names or run directories; the YAML file; e.g. rollout.replicas=2",
    )
    evaluate.add_argument(
        "--set", action="append", default=[], metavar="NAME", dest="sets", help="this set (default: all); repeats"
    )
    which = evaluate.add_mutually_exclusive_group()
    which.add_argument("--step", metavar="N", help="of runs: this checkpoint (default: the newest whole one)")
    which.add_argument("--best", action="store_true", help="of runs: the best evaluated checkpoint")
    evaluate.add_argument("--reverse-kl", action="store_true", help="start the teachers, and measure the reverse KL")
    evaluate.add_argument("--output", type=Path, help="JSON file (default: <output_dir>/<name>-evaluation.json)")


def _add_score(command: Command) -> None:
    score = command("score", "fill teacher scores into responses, for campaigns with replay")
    score.add_argument("config", metavar="CONFIG", help="YAML file, with the teachers")
    score.add_argument(
        "file", type=Path, metavar="FILE", help="prompts with responses, or a record or its run directory"
    )
    score.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teachers.default.replicas=2")
    score.add_argument("--prompt-field", metavar="NAME", help="of FILE (default: prompts.prompt_field)")
    score.add_argument("--response-field", metavar="NAME", help="of FILE; that of the prompt for whole conversations")
    score.add_argument("--output", type=Path, help="directory of the record (default: <output_dir>/<name>-scored)")


def _add_commands_of_a_run(command: Command) -> None:
    def of_a_run(name: str, text: str) -> argparse.ArgumentParser:
        sub = command(name, text)
        sub.add_argument("run", nargs="?", metavar="RUN", help=RUN_HELP)
        return sub

    status = of_a_run("status", "show what a campaign is doing; without RUN, list the runs that there are")
    status.add_argument("--watch", action="store_true", help="update the screen every two seconds")
    status.add_argument(
        "--json", action="store_true", help="print one JSON object; without RUN, a list with one for each run"
    )
    for name, text in (
        ("pause", "start nothing new until the campaign is resumed; work in flight is finished"),
        ("resume", "end a pause"),
        ("stop", "end a campaign with a checkpoint, like Ctrl-C; running it again resumes it"),
        ("scale", "change how many actors a running campaign has"),
    ):
        sub = of_a_run(name, text)
        if name == "scale":
            sub.add_argument("sizes", nargs="+", metavar="role=N", help="e.g. rollout=8 teacher.default=2")
    tail = of_a_run("tail", "print trajectories, coloured by how far student and teacher disagree")
    tail.add_argument("--rows", type=_count, default=8, metavar="N", help="trajectories of each evaluation (default 8)")
    tail.add_argument("--follow", action="store_true", help="print more as they are written, until the campaign ends")
    export = of_a_run("export", "write a checkpoint as a model that transformers and vLLM load")
    export.add_argument("out", metavar="OUT", type=Path, help="directory to write; it must not exist, or be empty")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", metavar="N", help="this checkpoint (default: the newest whole one)")
    which.add_argument("--best", action="store_true", help="the evaluated one with the highest accuracy or lowest KL")
    dtypes = ("float32", "bfloat16", "float16")
    export.add_argument("--dtype", choices=dtypes, help="of the weights (default: rollout.dtype, the engines')")
    export.add_argument("--adapter-only", action="store_true", help="with student.lora: the adapter, not merged")
    report = command("report", "write a self-contained HTML page about one or more runs")
    report.add_argument("runs", nargs="*", metavar="RUN", help=RUN_HELP)
    report.add_argument("--output", type=Path, help="file to write (default: report.html in the first run's directory)")


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)
