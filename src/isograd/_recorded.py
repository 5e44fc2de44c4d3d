"""Runs on disk, opened and diagnosed: the library's verbs behind `isograd diagnose`. It records nothing."""

from __future__ import annotations

import os

from isograd._diagnose import Diagnosis
from isograd._diagnose import diagnose as diagnose_histories
from isograd._rule import Options
from isograd._runs import Run, find_run, read_run
from isograd._settings import load_settings


def open_run(name: str | os.PathLike[str] | None = None) -> Run:
    """A recorded run: the latest by default, or the one with this id, unique beginning of an id, or path.

    Looks in the folder of the settings (`out`, by default `isograd-runs` in the current folder). Raises RunNotFound
    or RunUnreadable.
    """
    return read_run(find_run(None if name is None else os.fspath(name), load_settings().out))


def diagnose(run: Run | str | os.PathLike[str] | None = None) -> Diagnosis:
    """The diagnosis of a recorded run, computed anew from what it measured; `run` as for `open_run`.

    Rules take their options from `[tool.isograd.rules.<name>]` of the nearest pyproject.toml. Raises RunNotFound or
    RunUnreadable; never because of what the run holds.
    """
    return diagnose_run(run if isinstance(run, Run) else open_run(run), load_settings().rules)


def diagnose_run(run: Run, options: Options) -> Diagnosis:
    """The same for an open run and options of rules that are known already."""
    return diagnose_histories(run.histories, run=run.id, overhead=run.meta.get("overhead"), options=options)
