"""The command line: calls the function of the command, and turns errors into a line and an exit status.

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from actors.errors import CampaignError, UserError
from actors.plain_text import concealed, printable
from actors.quick_imports import quick_imports
from cluster.config import CampaignConfig
from cluster.console.arguments import command_parser
from cluster.console.runs import find_run, listing, named_run
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
        return COMMANDS[options.command](options)
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
        saved = "a checkpoint is written; the same command resumes from it"
        nothing = "there was nothing to save before the first update; the same command begins again"
        print(f"interrupted: {saved if summary['updates'] else nothing}", file=sys.stderr)
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
    print(send(run_dir, options.command, sizes))
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
        print("interrupted: what was trained is saved; the same command goes on with it", file=sys.stderr)
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
    print_table(table(results), named_by=2)
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


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    **{"run": _run, "check": _check, "submit": _submit, "plan": _plan, "compare": _compare},
    **{"evaluate": _evaluate, "score": _score},
    **{"status": _status, "pause": _steer, "resume": _steer, "stop": _steer, "scale": _steer},
    **{"tail": _tail, "export": _export, "report": _report},
}
"""Name -> its function, which returns the exit status. Their arguments are in console/arguments.py."""
LONG_COMMANDS = ("run", "check", "submit", "compare", "plan", "evaluate", "score")
"""Commands that end with one line on any signal that asks for it."""
