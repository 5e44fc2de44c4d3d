"""The command line: arguments -> public functions -> exit status. What is said is in `_report.py`.

Statuses: `run` ends with the script's own, or 3 when `--fail-on` asks for it; `diagnose` and `preflight` with 0
healthy, 1 causes, 2 cannot; the others with 0 or 2. A user's mistake is one sentence on stderr and status 2.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from isograd import __version__
from isograd._errors import IsogradError

if TYPE_CHECKING:
    from isograd._diagnose import Diagnosis
    from isograd._history import History
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


@cli.command(
    short_help="Run a script, watch it train, say what is wrong.", context_settings={"allow_interspersed_args": False}
)
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
@click.option("-m", "module", is_flag=True, help="SCRIPT is the name of a module, as for python -m.")
@click.argument("script")
@click.argument("args", nargs=-1, type=click.UNPROCESSED)
def run(*, script: str, args: tuple[str, ...], module: bool, fail_on: str | None, **asked: Any) -> int:
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
    )
    # What the script made of these is over: a module of its own could have the name of one that is imported next.
    sys.stderr, sys.path[:] = stderr, path
    if outcome.note:
        click.echo(f"isograd: {outcome.note}", err=True)
    failed = outcome.run is not None and _tell(outcome.run, settings, fail_on=fail_on)
    return _FAILED_ON if failed else outcome.status


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


@cli.command()
@click.argument("name")
def explain(*, name: str) -> int:
    """Explain a symptom, cause, remedy or statistic by its NAME."""
    from isograd import _explain
    from isograd._terminal import show

    show(_explain.explain(name), sys.stdout)
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
    _show(diagnosis, opened.histories, file=file, verbose=verbose)


def _show(diagnosis: Diagnosis, histories: Sequence[History], *, file: Any, verbose: bool) -> None:
    from isograd._report import verdict
    from isograd._terminal import show

    show(verdict(diagnosis, histories, verbose=verbose), file)


def _print_json(value: object) -> None:
    from isograd._terminal import write

    write(json.dumps(value, indent=2, allow_nan=False) + "\n", sys.stdout)
