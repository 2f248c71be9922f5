"""The command line: parses the arguments, calls the command's function, and turns errors into a line and an exit status.

Exit status 0: done. 2: the user's input is wrong, and one line says what and where. 130: interrupted, with a checkpoint.
1: anything else. Commands import their modules late, so that `--help` and mistakes in the configuration are answered
without loading torch and Ray.
"""

import argparse
import io
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from actors.errors import CampaignError, UserError
from actors.plain_text import concealed, printable
from actors.quick_imports import quick_imports
from cluster.config import CampaignConfig
from cluster.console.arguments import HelpfulParser
from cluster.console.runs import RUN_HELP, find_run, listing, named_run
from cluster.console.terminal import lasting_output
from cluster.interrupts import INTERRUPTED_STATUS, INTERRUPTS
from cluster.phases import START
from cluster.records.writer import REPORT_FILE

END_SECONDS = 10.0
"""How long a command whose work is done may take to leave: threads of libraries that wait for a server are not waited for."""


def main(arguments: list[str] | None = None) -> None:
    """Runs one command and exits with its status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # an encoding that lacks a character must not end a command
            stream.reconfigure(errors="backslashreplace")
    parser = command_parser()
    options, others = parser.parse_known_args(arguments)
    # `run CONFIG --flag key=value`: argparse leaves positional arguments behind an option over.
    words = "sources" if hasattr(options, "sources") else "overrides"
    if [other for other in others if other.startswith("-") or not hasattr(options, words)]:
        options.parser.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        setattr(options, words, [*getattr(options, words), *others])
    repeated = _repeated(getattr(options, words, []))
    if repeated:
        parser.error(f"{repeated} is given twice")
    if options.command in LONG_COMMANDS:
        with INTERRUPTS.heard(), lasting_output():
            status = _status_of(options)
    else:
        status = _status_of(options)
    if arguments is None:  # called as a program, not by a test
        _end_soon(status)
    sys.exit(status)


def _repeated(overrides: list[str]) -> str | None:
    """A key that is given twice; which value was meant, nobody can tell."""
    keys = [override.partition("=")[0].strip() for override in overrides if "=" in override]
    return next((key for key in keys if keys.count(key) > 1), None)


def _status_of(options: argparse.Namespace) -> int:
    """Runs the command; its exit status, once what went wrong is printed."""
    try:
        return options.command(options)
    except (UserError, CampaignError) as error:
        print(f"understudy: {concealed(printable(str(error)))}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader of our output has closed it, for example `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("understudy: interrupted", file=sys.stderr)
        return INTERRUPTED_STATUS


def _end_soon(status: int) -> None:
    """Ends the process in END_SECONDS if it has not ended by then: a library's thread may wait for a server for ever."""

    def end() -> None:
        time.sleep(END_SECONDS)
        os._exit(status)

    threading.Thread(target=end, daemon=True).start()


def command_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their arguments."""
    parser = HelpfulParser(prog="understudy", description="On-policy distillation of language models on Ray.")
    parser.add_argument("--version", action=_Version, help="print the versions of everything that a campaign runs with")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, function: object, text: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(command=function, parser=sub)
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


Command = Callable[[str, object, str], argparse.ArgumentParser]
"""(name, function, help) -> the parser of one command."""


def _add_commands_of_a_configuration(command: Command) -> None:
    def configured(name: str, function: object, text: str, example: str, **how: Any) -> argparse.ArgumentParser:
        sub = command(name, function, text)
        sub.add_argument("config", help="YAML file", **how)
        sub.add_argument("overrides", nargs="*", metavar="key=value", help=example)
        return sub

    example = "e.g. rollout.replicas=2"
    run = configured("run", _run, "run a campaign, or resume it where it stopped", example, nargs="?")
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
    check = configured(
        "check", _check, "check configuration, models, prompts and cluster before a campaign starts", example
    )
    check.add_argument(
        "--offline", action="store_true", help="ask no cluster, and skip files that are not on this machine"
    )
    submit = configured("submit", _submit, "run a campaign as a job on a Ray cluster", example)
    submit.add_argument("--address", help="job server of the cluster (default: $RAY_API_SERVER_ADDRESS, else local)")
    submit.add_argument("--env", action="append", default=[], metavar="NAME[=value]", help="set in the job; repeats")
    submit.add_argument("--follow", action="store_true", help="show the job's output until it ends")
    plan = configured("plan", _plan, "predict throughput and recommend how many actors of each role to start", example)
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
    versus = configured("compare", _compare, text, "rl:key=value applies to that method only")
    versus.add_argument(
        "--methods", default="opd,rl,sft", help="some of opd, sft, sft_then_opd, opd_reward, rl (default opd,rl,sft)"
    )
    versus.add_argument("--seeds", default="0,1,2", help="default 0,1,2")
    versus.add_argument("--target", type=float, default=0.95, help="share of the teacher's accuracy (default 0.95)")
    versus.add_argument("--output", type=Path, help="page to write (default: <output_dir>/<name>-comparison.html)")


def _add_evaluate(command: Command) -> None:
    evaluate = command(
        "evaluate", _evaluate, "evaluate models on the held-out prompts of a configuration, without training"
    )
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
    score = command("score", _score, "fill teacher scores into responses, for campaigns with replay")
    score.add_argument("config", metavar="CONFIG", help="YAML file, with the teachers")
    score.add_argument(
        "file", type=Path, metavar="FILE", help="prompts with responses, or a record or its run directory"
    )
    score.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. teachers.default.replicas=2")
    score.add_argument("--prompt-field", metavar="NAME", help="of FILE (default: prompts.prompt_field)")
    score.add_argument("--response-field", metavar="NAME", help="of FILE; that of the prompt for whole conversations")
    score.add_argument("--output", type=Path, help="directory of the record (default: <output_dir>/<name>-scored)")


def _add_commands_of_a_run(command: Command) -> None:
    def of_a_run(name: str, function: object, text: str) -> argparse.ArgumentParser:
        sub = command(name, function, text)
        sub.add_argument("run", nargs="?", metavar="RUN", help=RUN_HELP)
        return sub

    status = of_a_run("status", _status, "show what a campaign is doing; without RUN, list the runs that there are")
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
        sub = of_a_run(name, _steer, text)
        sub.set_defaults(order=name)
        if name == "scale":
            sub.add_argument("sizes", nargs="+", metavar="role=N", help="e.g. rollout=8 teacher.default=2")
    tail = of_a_run("tail", _tail, "print trajectories, coloured by how far student and teacher disagree")
    tail.add_argument("--rows", type=_count, default=8, metavar="N", help="trajectories of each evaluation (default 8)")
    tail.add_argument("--follow", action="store_true", help="print more as they are written, until the campaign ends")
    export = of_a_run("export", _export, "write a checkpoint as a model that transformers and vLLM load")
    export.add_argument("out", metavar="OUT", type=Path, help="directory to write; it must not exist, or be empty")
    which = export.add_mutually_exclusive_group()
    which.add_argument("--step", metavar="N", help="this checkpoint (default: the newest whole one)")
    which.add_argument("--best", action="store_true", help="the evaluated one with the highest accuracy or lowest KL")
    dtypes = ("float32", "bfloat16", "float16")
    export.add_argument("--dtype", choices=dtypes, help="of the weights (default: rollout.dtype, the engines')")
    export.add_argument("--adapter-only", action="store_true", help="with student.lora: the adapter, not merged")
    report = command("report", _report, "write a self-contained HTML page about one or more runs")
    report.add_argument("runs", nargs="*", metavar="RUN", help=RUN_HELP)
    report.add_argument("--output", type=Path, help="file to write (default: report.html in the first run's directory)")


def _count(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of 1 or more")
    return int(text)


def _run(options: argparse.Namespace) -> int:
    if START.rows():  # of another command of this process
        START.begin()
    with START.shown():
        with START.phase("looking at the configuration"):
            config = _config_of_run(options)
        with START.phase("importing Ray and transformers"), quick_imports():
            from cluster.console.screen import summary_table
            from cluster.run import run_campaign

        summary, complete = run_campaign(config, options.resume_from, options.allow_change)
    print(summary_table(summary))
    print(f"report: {(config.run_dir / REPORT_FILE).resolve()}")
    if not complete:
        print("interrupted: a checkpoint is written; the same command resumes from it", file=sys.stderr)
    return 0 if complete else INTERRUPTED_STATUS


def _config_of_run(options: argparse.Namespace) -> CampaignConfig:
    from cluster.config_file import load_config

    if options.resume is not None:
        from cluster.state.resume import config_of

        name, overrides = options.resume or None, [*filter(None, [options.config]), *options.overrides]
        if name and "=" in name and not Path(name).exists():  # `--resume key=value`: no run is named
            name, overrides = None, [name, *overrides]
        return config_of(find_run(name, "--resume"), overrides)
    if options.config:
        return load_config(options.config, options.overrides)
    raise UserError("run", "nothing to run", "CONFIG, a YAML file, or --resume RUN_DIR")


def _check(options: argparse.Namespace) -> int:
    from cluster.config_file import load_config

    config = load_config(options.config, options.overrides)
    print(f"configuration: ok ({options.config})")
    from cluster.console.screen import PlainConsole

    console = PlainConsole()
    with console.status("importing Ray and transformers"), quick_imports():
        from cluster.preflight import checks, doing

    for name, check in checks(config, offline=options.offline):
        if check is None:
            print(printable(f"{name}: not looked at (offline)"))
            continue
        start = time.perf_counter()
        with console.status(printable(f"{name}: {doing(name)}")):
            found = check()
        print(concealed(printable(f"{name}: ok ({found}; {time.perf_counter() - start:.1f} s)")))
    return 0


def _submit(options: argparse.Namespace) -> int:
    from cluster.fleet.ray_jobs import follow, submit

    client, job = submit(options.config, options.overrides, address=options.address, environment=options.env)
    address = client.get_address()
    print(f"job: {job}\nfollow it: ray job logs --address {address} --follow {job}", flush=True)
    print(f"stop it: ray job stop --address {address} {job}", flush=True)
    return follow(client, job) if options.follow else 0


def _plan(options: argparse.Namespace) -> int:
    from cluster.config_file import load_config

    config = load_config(options.config, options.overrides)
    from cluster.commands.plan import from_calibration, from_data_sheet, from_run
    from cluster.console.screen import print_table
    from cluster.planning.datasheet import Load
    from cluster.planning.throughput import for_gpus, table

    trajectories = config.trajectories_per_update
    if options.gpu:
        length = options.response_tokens or config.sampling.max_response_tokens / 2
        plan, memory = from_data_sheet(config, options.gpu, Load(trajectories, options.prompt_tokens, length))
        print_table(memory)
        if config.environment is not None:
            print("environment: its time is on no data sheet, and left out here; --run and --calibrate measure it")
    else:
        from cluster.run import run_campaign

        run_dir = find_run(options.run, "--run") if options.run else config.run_dir
        plan = from_calibration(config, run_campaign) if options.calibrate else from_run(config, run_dir)
    plans = [("as configured", plan)]
    if options.gpus is not None:
        try:
            plans.append((f"best for {options.gpus:g} GPUs", for_gpus(plan, options.gpus)))
        except ValueError as error:
            raise UserError("--gpus", f"{options.gpus:g} ({error})", "at least those") from error
    print_table(table(plans))
    if config.record:
        from cluster.planning.record_size import record_sentence

        print(f"record: {record_sentence(config)}")
    for name, found in plans:
        print(f"{name}: {trajectories / found.update_seconds:,.3g} trajectories/s; {found.sentence()}")
        if told := found.sharing():
            print(f"{name}: {told}")
    return 0


def _status(options: argparse.Namespace) -> int:
    from rich.live import Live

    from cluster.console.screen import PlainConsole, print_table, runs_table, status_screen
    from cluster.console.status import EVERY_SECONDS, RUNNING_STATES, StatusReader, read_status

    if options.run is None and not options.watch and (len(rows := listing()) > 1 or options.json):
        print(json.dumps(rows, indent=2)) if options.json else print_table(runs_table(rows))
        return 0
    run_dir = find_run(options.run)
    if options.json:
        print(json.dumps(read_status(run_dir), indent=2))
        return 0
    console = PlainConsole()
    if not options.watch:
        console.print(status_screen(read_status(run_dir)))
        return 0
    reader = StatusReader(run_dir)
    with Live(status_screen(reader.read()), console=console, screen=console.is_terminal) as live:
        while (status := reader.read())["state"] in RUNNING_STATES:
            live.update(status_screen(status))
            time.sleep(EVERY_SECONDS)
    console.print(status_screen(status))
    return 0


def _steer(options: argparse.Namespace) -> int:
    from cluster.console.control import send
    from cluster.console.status import RUNNING_STATES, read_status

    given = list(getattr(options, "sizes", []))
    if given and options.run and "=" in options.run and not Path(options.run).exists():
        given, options.run = [options.run, *given], None  # `scale rollout=2 teacher=1`: no run is named
    sizes: dict[str, int] = {}
    for size in given:
        role, _, number = size.partition("=")
        if not re.fullmatch("[0-9]{1,9}", number):
            raise UserError("scale", size, "role=N, for example rollout=8")
        sizes[role] = int(number)
    run_dir = find_run(options.run, states=RUNNING_STATES)
    if (state := read_status(run_dir)["state"]) == "starting":
        print(f"{run_dir} is starting: waiting until it takes commands (Ctrl-C gives up)", file=sys.stderr)
        while (state := read_status(run_dir)["state"]) == "starting":
            time.sleep(0.5)
    if state not in ("running", "paused"):
        raise UserError("RUN", f"{run_dir}, which is {state}", "a campaign that is running")
    print(send(run_dir, options.order, sizes))
    return 0


def _tail(options: argparse.Namespace) -> int:
    from cluster.console.screen import PlainConsole, trajectory_text
    from cluster.console.status import EVERY_SECONDS, RUNNING_STATES, read_status
    from cluster.records.writer import read_jsonl, trajectory_files

    run_dir, console, shown = find_run(options.run), PlainConsole(), -1
    while True:
        going = read_status(run_dir)["state"] in RUNNING_STATES
        files = {step: path for step, path in trajectory_files(run_dir).items() if step > shown}
        for step in sorted(files) if options.follow else sorted(files)[-1:]:
            for row in read_jsonl(files[step], checked=True)[: options.rows]:
                console.print(trajectory_text(row))
            shown = step
        if not (options.follow and going):
            return 0
        time.sleep(EVERY_SECONDS)


def _compare(options: argparse.Namespace) -> int:
    from cluster.commands.compare import compare, trials
    from cluster.commands.courses import COSTS, equal_cost_table, table, write_comparison

    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError as error:
        raise UserError("--seeds", options.seeds, "whole numbers with commas between them") from error
    if not 0 <= options.target <= 1:
        raise UserError("--target", options.target, "a share of the teacher's accuracy, 0 to 1")
    found = trials(options.config, options.overrides, options.methods.split(","), seeds)
    from cluster.run import run_campaign

    results = compare(found, run_campaign, lambda line: print(line, flush=True))
    if results is None:
        print("interrupted: a checkpoint is written; the same command resumes from it", file=sys.stderr)
        return INTERRUPTED_STATUS
    first = found[0].config
    output = (
        options.output or first.run_dir.parent / f"{first.name.rpartition(f'-{found[0].method}-')[0]}-comparison.html"
    )
    print(table(results, options.target))
    for cost in COSTS:
        if at_equal_cost := equal_cost_table(results, cost):
            print(f"\n{at_equal_cost}")
    print(f"report: {write_comparison(results, output).resolve()}")
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from cluster.config_file import load_config

    overrides = [word for word in options.sources if re.match(r"[\w.-]+=", word)]
    *sources, file = [word for word in options.sources if word not in overrides] or [""]
    if not sources or not Path(file).is_file():
        found = f"{file or 'nothing'} as the last of them"
        raise UserError("evaluate", found, "MODEL_OR_RUN, one or several, then CONFIG, a YAML file")
    config = load_config(file, overrides)
    from cluster.commands.evaluate import evaluate, models_of, table, to_evaluate, write_results
    from cluster.console.screen import print_table
    from cluster.records.event_table import describe

    wanted = to_evaluate(config, options.sets, options.reverse_kl)
    models = models_of(sources, options.step, options.best)

    def on_event(kind: str, **fields: Any) -> None:
        print(f"understudy: {concealed(printable(describe(kind, fields)))}", file=sys.stderr, flush=True)

    results = evaluate(wanted, models, on_event, lambda line: print(line, flush=True))
    print_table(table(results))
    output = options.output or Path(config.output_dir) / f"{config.name}-evaluation.json"
    write_results(wanted, models, results, output)
    print(f"results: {output.resolve()}")
    return 0


def _score(options: argparse.Namespace) -> int:
    from cluster.config_file import load_config

    config = load_config(options.config, options.overrides)
    from cluster.commands.score import score, to_score
    from cluster.records.event_table import describe

    def on_event(kind: str, **fields: Any) -> None:
        print(f"understudy: {concealed(printable(describe(kind, fields)))}", file=sys.stderr, flush=True)

    output = options.output or Path(config.output_dir) / f"{config.name}-scored"
    wanted = to_score(config, options.file, options.prompt_field, options.response_field)
    done = score(wanted, options.file, output, on_event, lambda line: print(line, flush=True))
    print(f"scored: {done}; replay them with replay={output.resolve()}")
    return 0


def _export(options: argparse.Namespace) -> int:
    if options.run is None and named_run(str(options.out)) is not None:
        raise UserError("OUT", f"{options.out}, which is a run", f"understudy export {options.out} OUT")
    run_dir = find_run(options.run)
    from cluster.commands.export import export

    step, dtype = export(
        run_dir,
        options.out,
        step=options.step,
        best=options.best,
        dtype=options.dtype,
        adapter_only=options.adapter_only,
    )
    what = "the adapter" if options.adapter_only else "the student"
    print(f"{what} after update {step}, in {dtype}: {options.out.resolve()}")
    return 0


def _report(options: argparse.Namespace) -> int:
    found = [find_run(name) for name in options.runs or [None]]
    run_dirs = [run for i, run in enumerate(found) if not any(run.samefile(other) for other in found[:i])]
    from cluster.report.page import write_report

    output = options.output or run_dirs[0] / REPORT_FILE
    print(f"report: {write_report(run_dirs, output).resolve()}")
    return 0


LONG_COMMANDS = (_run, _check, _submit, _compare, _plan, _evaluate, _score)
"""Commands that end with one line on any signal that asks for it."""
