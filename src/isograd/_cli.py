"""The command line: arguments -> public functions -> exit status. What is said is in `_report.py`.

Statuses: `run` ends with the script's own, or 3 when `--fail-on` asks for it; `diagnose`, `treat` and
`preflight` with 0 healthy, 1 causes, 2 cannot; `fix` with 0 where something was measured to help, 1 where nothing was;
`replay` with 0 reproduced, 1 not, 2 cannot; the others with 0 or 2. A user's mistake is one sentence on stderr and
status 2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isograd import __version__
from isograd._errors import IsogradError

if TYPE_CHECKING:
    from isograd._capsule import Capsule
    from isograd._changes import Change
    from isograd._diagnose import Diagnosis
    from isograd._fix import Fix
    from isograd._guard import Guard
    from isograd._history import History
    from isograd._remedy import Remedy
    from isograd._replay import Replay
    from isograd._runs import Run
    from isograd._settings import Settings

# Imports are delayed into the commands: `--help` answers at once, and a script finds its process as Python makes it.

_CANNOT = 2
_FAILED_ON = 3
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line with `arguments` (those of the process by default) and return its exit status."""
    try:
        return int(cli.main(args=arguments, prog_name="isograd", standalone_mode=False) or 0)
    except click.ClickException as error:
        return _refuse(error.format_message())
    except IsogradError as error:
        return _refuse(str(error))
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED


def _refuse(sentence: str) -> int:
    click.echo(f"isograd: {sentence}", err=True)
    return _CANNOT


@click.group(
    invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, message="isograd %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Find why gradients vanish or explode in an unchanged training script."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


_OWN_ARGUMENTS = {"allow_interspersed_args": False}
"""What follows the script belongs to the script."""


@cli.command(short_help="Run a script, watch it train, say what is wrong.", context_settings=_OWN_ARGUMENTS)
@click.option("--steps", type=int, metavar="N", help="End the run cleanly after N optimizer steps.")
@click.option("--every", type=int, metavar="K", help="Read the deep tier at least every K steps.")
@click.option("--seed", type=int, metavar="S", help="Seed Python, NumPy and the framework before the script starts.")
@click.option("--out", metavar="DIR", help="Folder for run folders (default: isograd-runs).")
@click.option("--budget", type=float, metavar="F", help="Share of wall time that watching is allowed (default: 0.01).")
@click.option(
    "--fail-on",
    type=click.Choice(["info", "warning", "error"]),
    metavar="LEVEL",
    help="Exit with status 3 if a cause reaches LEVEL: info, warning or error.",
)
@click.option(
    "--apply",
    "treatments",
    multiple=True,
    metavar="REMEDY[:k=v,…]",
    help="Train with this remedy applied, as `isograd treat` names it; may be given several times.",
)
@click.option(
    "--guard",
    metavar="ACTION,…",
    help="At bad steps: skip, clip, rewind, stop, lower-learning-rate[=F]; several are tried mildest first.",
)
@click.option("-m", "module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(
    *,
    script: str,
    args: tuple[str, ...],
    module: bool,
    fail_on: str | None,
    treatments: tuple[str, ...],
    guard: str | None,
    **asked: Any,
) -> int:
    """Run SCRIPT unchanged with ARGS, watch it train, and say what is wrong.

    Everything after SCRIPT belongs to the script. isograd speaks on stderr; the exit status is the script's own.
    """
    settings = _settings(**asked)
    if not settings.enabled:
        # Switched off: the process becomes Python with the script, and nothing of isograd is in it.
        os.execv(sys.executable, [sys.executable, *(["-m"] if module else []), script, *args])  # noqa: S606  # the user's own
    from isograd._launch import launch

    # `python -m isograd` looks for modules in the current folder, where the script's own are.
    stderr, path = sys.stderr, [entry for entry in sys.path if entry not in ("", str(Path.cwd()))]
    outcome = launch(
        [script, *args],
        module=module,
        steps=settings.steps,
        every=settings.every,
        seed=settings.seed,
        out=settings.out,
        budget=settings.budget,
        changes=_changes_of(treatments, script if module else Path(script).name, settings) if treatments else (),
        guard=None if guard is None else _guard_of(guard),
    )
    # What the script made of these is over: a module of its own could have the name of one that is imported next.
    sys.stderr, sys.path[:] = stderr, path
    if outcome.note:
        click.echo(f"isograd: {outcome.note}", err=True)
    failed = outcome.run is not None and _tell(outcome.run, settings, fail_on=fail_on)
    return _FAILED_ON if failed else outcome.status


def _guard_of(text: str) -> Guard:
    from isograd._guard import parse_guard

    try:
        return parse_guard(text)
    except ValueError as error:
        raise IsogradError(f"--guard: {error}.") from None


def _changes_of(texts: Sequence[str], script: str, settings: Settings) -> tuple[Change, ...]:
    """What `--apply` asks for in a program, as the last untreated run of the same script has shown it."""
    from isograd._history import History
    from isograd._runs import list_runs, read_run
    from isograd._treat import parse

    remedies = [_parsed(parse, text) for text in texts]
    runs = (read_run(one.path) for one in reversed(list_runs(settings.out)) if one.script == script and one.steps)
    seen = next((run.histories for run in runs if not any(_is_treated(history) for history in run.histories)), ())
    found: list[Change] = []
    for remedy in remedies:
        attempts = [_resolved(remedy, history) for history in seen or (History(),)]
        whys = [attempt for attempt in attempts if isinstance(attempt, str)]
        if len(whys) == len(attempts):
            unseen = "" if seen else f" isograd has not seen {script} train yet: run it once without --apply."
            raise IsogradError(f"{remedy} has no place here: {whys[0]}{unseen}")
        wanted = [change for attempt in attempts if not isinstance(attempt, str) for change in attempt]
        if not wanted:
            why = (
                "is advice that only a human can follow" if remedy.applicability == "advice" else "changes nothing here"
            )
            raise IsogradError(f"{remedy} {why}: isograd explain {remedy.remedy_name()} tells more.")
        found += wanted
    return tuple(dict.fromkeys(found))


def _resolved(remedy: Remedy, history: History) -> tuple[Change, ...] | str:
    """What it changes in a program, or why it has no place there."""
    from isograd._remedy import Inapplicable

    try:
        return remedy.changes(history)
    except Inapplicable as why:
        return str(why)
    except ValueError as error:
        raise IsogradError(f"{remedy}: {error}.") from None


def _parsed(parse: Callable[[str], Remedy], text: str) -> Remedy:
    try:
        return parse(text)
    except ValueError as error:
        raise IsogradError(f"{str(error).rstrip('.')}.") from None


def _is_treated(history: History) -> bool:
    return any(event.kind == "treatment-applied" for event in history.events)


def _tell(recorded: Path | Run, settings: Settings, *, fail_on: str | None) -> bool:
    """Show the verdict on a run that has just ended; whether a cause reaches the level `fail_on`."""
    try:
        run, diagnosis = _diagnosed(recorded, settings)
    except IsogradError as error:
        # The script's own exit status stands, whatever became of its record.
        _refuse(str(error))
        return False
    if not sys.stderr.closed:
        _show_verdict(run, diagnosis, file=sys.stderr, verbose=False)
    return fail_on is not None and bool(diagnosis.at_least(fail_on))  # type: ignore[arg-type]


@cli.command(short_help="Say what is wrong with a recorded run.")
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON of schema 1.")
@click.option("-v", "--verbose", is_flag=True, help="Tell everything: all evidence, notes, and what was not measured.")
def diagnose(*, run: str | None, as_json: bool, verbose: bool) -> int:
    """Say what is wrong with RUN: an id, the beginning of one, or a path; the latest run by default."""
    opened, diagnosis = _diagnosed(run, _settings())
    if not diagnosis.steps:
        raise IsogradError(f"{opened.id} holds no optimizer step: there is nothing to diagnose.")
    if as_json:
        _print_json(diagnosis.to_dict())
    else:
        _show_verdict(opened, diagnosis, file=sys.stdout, verbose=verbose)
    return 0 if diagnosis.healthy else 1


@cli.command(short_help="Say what could be done about a recorded run.")
@click.argument("run", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print JSON of schema 1.")
def treat(*, run: str | None, as_json: bool) -> int:
    """Propose treatments for the causes found in RUN, best first, each with the code to paste. None is tried."""
    from isograd._report import proposals
    from isograd._terminal import show
    from isograd._treat import treat as propose

    opened, diagnosis = _diagnosed(run, _settings())
    found = propose(diagnosis)
    if as_json:
        told = [treatment.to_dict() for treatment in found]
        _print_json({"schema": 1, "run": opened.id, "healthy": diagnosis.healthy, "treatments": told})
    else:
        show(proposals(diagnosis, found), sys.stdout)
    return 0 if diagnosis.healthy else 1


@cli.command(short_help="Say what is wrong with a model before its first step.")
@click.argument("target")
@click.option("--input", "shape", metavar="SHAPE", help="Try it on a random batch of this shape, as 64x1x28x28.")
@click.option("--no-sharpness", is_flag=True, help="Leave out the curvature of the loss, which takes the longest.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON of schema 1.")
@click.option("-v", "--verbose", is_flag=True, help="Tell everything: all evidence, notes, and what was not measured.")
def preflight(*, target: str, shape: str | None, no_sharpness: bool, as_json: bool, verbose: bool) -> int:
    """Say what is wrong with a model before its first step: from its structure, and from one batch.

    TARGET is module:callable or file.py:callable; called without arguments, it returns a model, or (model, batch), or
    (model, batch, loss_fn), or (model, batch, loss_fn, optimizer). Nothing of it is changed.
    """
    from isograd._preflight import preflight_target

    try:
        diagnosis = preflight_target(target, shape=shape, sharpness=not no_sharpness)
    except ValueError as error:
        raise IsogradError(f"{error}.") from None
    if as_json:
        _print_json(diagnosis.to_dict())
    else:
        _show(diagnosis, diagnosis.histories, file=sys.stdout, verbose=verbose)
    return 0 if diagnosis.healthy else 1


@cli.command(short_help="Try treatments on a script and say which of them helps.", context_settings=_OWN_ARGUMENTS)
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="End every run after N optimizer steps.")
@click.option("--seeds", type=click.IntRange(2, 10), default=3, metavar="K", help="Pairs of runs that verify (3).")
@click.option("--jobs", type=click.IntRange(min=1), metavar="J", help="Runs at once (default: the number of cores).")
@click.option("--all", "every", is_flag=True, help="Try every remedy of the catalogue that has a place here.")
@click.option("--limit", type=float, default=600.0, metavar="S", help="End a run after S seconds (600).")
@click.option("--capsule", metavar="CAPSULE", help="Try them on this one captured step of SCRIPT instead.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON of schema 1.")
@click.option("-m", "module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def fix(
    *,
    script: str,
    args: tuple[str, ...],
    module: bool,
    as_json: bool,
    jobs: int | None,
    every: bool,
    capsule: str | None,
    **how: Any,
) -> int:
    """Run SCRIPT, say what is wrong, try treatments side by side with it, and print what was measured to help.

    The script runs several times in the current folder: what it writes, each run writes.
    """
    if capsule is not None:
        asked = {"jobs": jobs, "every": every, "seconds": how["limit"]}
        return _fix_capsule(capsule, (script, *args), module=module, as_json=as_json, **asked)
    from isograd._fix import fix as search
    from isograd._launch import check_script
    from isograd._terminal import show
    from isograd._trial import Program, available_memory
    from isograd._trial_progress import StageProgress
    from isograd._trial_table import FixTable

    check_script(script, module=module)
    settings, cores = _settings(), os.cpu_count() or 1
    jobs = jobs or cores
    memory = available_memory()
    with StageProgress(sys.stderr) as progress:
        found = search(
            Program(args=(script, *args), module=module),
            jobs=jobs,
            every=every,
            threads=max(1, cores // jobs),
            memory=None if memory is None else memory // jobs,
            keep=Path(settings.out),
            options=settings.rules,
            report=progress.report,
            **how,
        )
    if not found.diagnosis.steps:
        raise IsogradError(f"{script} cannot be treated: {found.error}.")
    _keep(found)
    if as_json:
        _print_json(found.to_dict())
    else:
        show(FixTable(fix=found), sys.stdout)
    return 0 if found.best is not None else 1


def _keep(found: Fix) -> None:
    """Leave what was measured beside the untreated run, for its page."""
    from isograd._fix_file import write_fix

    unkept = found.unkept
    if found.folder is not None:
        try:
            write_fix(found.folder, found.to_keep())
        except OSError as error:
            unkept = f"{found.folder} cannot be written ({error.strerror or error})"
    if unkept:
        click.echo(f"isograd: {unkept}: `isograd report` cannot show what was tried.", err=True)


def _fix_capsule(path: str, args: tuple[str, ...], *, module: bool, as_json: bool, **asked: Any) -> int:
    from isograd._capsule import open_capsule
    from isograd._capsule_fix import fix_capsule
    from isograd._launch import check_script
    from isograd._replay_table import CapsuleFixTable
    from isograd._terminal import show
    from isograd._trial import Program

    opened = open_capsule(path)
    check_script(args[0], module=module)
    found = fix_capsule(opened, Program(args=args, module=module), options=_settings().rules, **asked)
    if as_json:
        _print_json(found.to_dict())
    else:
        show(CapsuleFixTable(fix=found), sys.stdout)
    return 0 if found.best is not None else 1


@cli.command(short_help="Run a captured step again and name what broke in it.", context_settings=_OWN_ARGUMENTS)
@click.argument("capsule")
@click.argument("program", nargs=-1, type=click.UNPROCESSED, metavar="[--json] [-m] [SCRIPT [ARGS]... | TARGET]")
def replay(*, capsule: str, program: tuple[str, ...]) -> int:
    """Run the step in the folder CAPSULE again, say whether it is the same, and name the first operation that broke.

    SCRIPT with its ARGS is run up to where the step begins, in processes of its own and in the current folder: what it
    writes before that, it writes. With -m it is the name of a module. TARGET is module:callable or file.py:callable;
    called without arguments, it returns (model, step_fn) or (model, step_fn, optimizer). Only what is named here is
    run. Without it, what the capsule holds is said.
    """
    from isograd._capsule import open_capsule
    from isograd._replay_table import CapsuleReport, ReplayReport
    from isograd._terminal import show

    flags, rest = _leading(program, ("--json", "-m"))
    opened = open_capsule(capsule)
    if not rest:
        show(CapsuleReport(capsule=opened), sys.stdout)
        return _CANNOT
    found = _replayed(opened, rest, module="-m" in flags)
    if "--json" in flags:
        _print_json(found.to_dict())
    else:
        show(ReplayReport(replay=found), sys.stdout)
    return 0 if found.reproduced else 1


def _leading(arguments: Sequence[str], known: Sequence[str]) -> tuple[set[str], list[str]]:
    """(the options that stand first, the rest): what follows a script's name is the script's."""
    count = next((i for i, argument in enumerate(arguments) if argument not in known), len(arguments))
    return set(arguments[:count]), list(arguments[count:])


def _replayed(opened: Capsule, program: Sequence[str], *, module: bool) -> Replay:
    from isograd._launch import check_script
    from isograd._rerun import replay_callable, replay_script
    from isograd._trial import Program

    if not module and ":" in program[0] and not Path(program[0]).exists():
        return replay_callable(opened, program[0])
    check_script(program[0], module=module)
    return replay_script(opened, Program(args=tuple(program), module=module))


@cli.command(short_help="Write the page of a recorded run: one HTML file.")
@click.argument("run", required=False)
@click.option("-o", "output", metavar="FILE", help="Where to (default: report.html in the run's folder); - is stdout.")
def report(*, run: str | None, output: str | None) -> int:
    """Write the page of RUN: an id, the beginning of one, or a path; the latest by default.

    It is one HTML file with everything inside: it opens in any browser and asks the network for nothing.
    """
    from isograd._page import render
    from isograd._page_data import read_page
    from isograd._runs import find_run
    from isograd._whole_file import write_whole

    settings = _settings()
    folder = find_run(run, settings.out)
    data = read_page(folder, settings.rules)
    page = render(data)
    if data["run"]["damage"]:
        click.echo(f"isograd: {data['run']['damage']}; the page shows the rest.", err=True)
    if output == "-":
        from isograd._terminal import write

        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(encoding="utf-8")  # as the page says of itself
        write(page, sys.stdout)
        return 0
    path = Path(output) if output is not None else (folder if folder.is_dir() else folder.parent) / "report.html"
    try:
        write_whole(path, page.encode())
    except (OSError, ValueError) as error:
        why = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise IsogradError(f"{path} cannot be written ({why}): -o names another place.") from None
    click.echo(str(path))
    return 0


@cli.command(short_help="Show recorded runs in the browser, live while they train.")
@click.argument("run", required=False)
@click.option("--host", default="127.0.0.1", metavar="H", help="Address to listen on (default: 127.0.0.1).")
@click.option("--port", type=click.IntRange(0, 65535), metavar="P", help="Port (default: a free one from 8765 on).")
@click.option("--token", metavar="T", help="Secret part of the address (default: a random one for each start).")
def serve(*, run: str | None, host: str, port: int | None, token: str | None) -> int:
    """Show RUN (an id, the beginning of one, or a path), or the list of runs, in the browser until Ctrl-C.

    The address that is printed carries a token, without which nothing is answered.
    """
    # A server beside a training is no place for thread pools: before NumPy is imported.
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")
    from isograd._runs import find_run
    from isograd._serve import serve as serve_runs
    from isograd._terminal import write

    settings = _settings()
    folder = None if run is None else find_run(run, settings.out).resolve()
    serve_runs(
        settings.out if folder is None else folder.parent,
        run=None if folder is None else folder.name,
        host=host,
        port=port,
        token=token,
        options=settings.rules,
        say=lambda words: write(f"{words}\n", sys.stdout),
    )
    return 0


@cli.command()
@click.argument("name")
def explain(*, name: str) -> int:
    """Explain a symptom, cause, remedy or statistic by its NAME."""
    from isograd import _explain
    from isograd._terminal import show

    show(_explain.explain(name), sys.stdout)
    return 0


@cli.command(short_help="Write a recorded run in a format that other tools read.")
@click.argument("run", required=False)
@click.option("--to", required=True, metavar="FORMAT", help="csv, parquet, tensorboard, wandb or mlflow.")
@click.option("-o", "path", metavar="PATH", help="The folder to make (default: <run>-<format> in the current folder).")
@click.option("--force", is_flag=True, help="Replace an earlier export at PATH.")
def export(*, run: str | None, to: str, path: str | None, force: bool) -> int:
    """Write all that RUN recorded in another format: an id, the beginning of one, or a path; the latest by default.

    Nothing is sent anywhere. Steps that were rolled up appear at the last step of their span, with their median.
    """
    from isograd._export_run import export_run
    from isograd._runs import find_run, read_run
    from isograd._terminal import write

    opened = read_run(find_run(run, _settings().out))
    made = export_run(opened, to=to, path=None if path is None else Path(path), force=force)
    if opened.damage:
        click.echo(f"isograd: {opened.damage}; what could be read of it was exported.", err=True)
    write(f"{made.path}\nTo read it: {made.reading}\n", sys.stdout)
    return 0


@cli.command(name="ls")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def ls(*, as_json: bool) -> int:
    """List the recorded runs, latest last."""
    from isograd._runs import list_runs

    runs = list_runs(_settings().out)
    if as_json:
        _print_json([dataclasses.asdict(summary) | {"path": str(summary.path)} for summary in runs])
    else:
        from isograd._report import run_table
        from isograd._terminal import show

        show(run_table(runs), sys.stdout)
    return 0


@cli.command(short_help="Take a guided tour on real data.")
def demo() -> int:
    """Take a tour on real handwritten digits: a network that does not learn, its diagnosis, and its healthy twin."""
    from isograd._demo import tour

    return tour()


def _settings(**arguments: Any) -> Settings:
    from isograd._settings import load_settings

    try:
        return load_settings(**arguments)
    except ValueError as error:
        raise IsogradError(str(error)) from None


def _diagnosed(recorded: Run | str | Path | None, settings: Settings) -> tuple[Run, Diagnosis]:
    from isograd._recorded import diagnose_run
    from isograd._runs import Run, find_run, read_run

    if not isinstance(recorded, Run):
        recorded = read_run(find_run(None if recorded is None else str(recorded), settings.out))
    return recorded, diagnose_run(recorded, settings.rules)


def _show_verdict(opened: Run, diagnosis: Diagnosis, *, file: Any, verbose: bool) -> None:
    from isograd._capsule import list_capsules
    from isograd._report import captured
    from isograd._terminal import write

    _show(diagnosis, opened.histories, file=file, verbose=verbose)
    capsules = list_capsules(opened.path)
    if capsules:
        command = opened.meta.get("command") or [""]
        # A session at a prompt or in a notebook has no script that could run again.
        is_script = command[0] == "-m" or Path(command[0]).is_file()
        write(captured(capsules, command if is_script else ["SCRIPT"]), file)


def _show(diagnosis: Diagnosis, histories: Sequence[History], *, file: Any, verbose: bool) -> None:
    from isograd._report import verdict
    from isograd._terminal import show

    show(verdict(diagnosis, histories, verbose=verbose), file)


def _print_json(value: object) -> None:
    from isograd._terminal import write

    write(json.dumps(value, indent=2, allow_nan=False) + "\n", sys.stdout)
