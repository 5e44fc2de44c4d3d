"""A captured step in the program that made it, in processes of its own, or in this one by a callable of the user's.

Only what the user names is run; of the capsule nothing is. The script runs three times side by side, each up to where
the step begins: twice as it is, for the noise of the machine, and once under the microscope.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from isograd._capsule import Capsule
from isograd._changes import Change
from isograd._errors import CannotReplay, IsogradError
from isograd._grade import Taken, graded
from isograd._replay import Replay, operation_of, shares_of
from isograd._trial import Program, be_alone, end_process, last_words, process_context


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One run of the program up to the captured step and through it."""

    program: Program
    capsule: Path
    looking: bool
    changes: tuple[Change, ...] = ()
    seconds: float = 600.0
    folder: Path = field(default_factory=Path.cwd)


def replay_script(
    capsule: Capsule,
    program: Program,
    *,
    changes: Sequence[Change] = (),
    jobs: int | None = None,
    seconds: float = 600.0,
) -> Replay:
    """Run the program to the captured step and through it, and say what came out.

    `changes` are applied to what it trains. `jobs`: processes at once; `seconds`: a limit for each. Raises
    CannotReplay where the step was not reached.
    """
    began = time.perf_counter()
    plain, looking = (
        _Job(program=program, capsule=capsule.path.absolute(), looking=looks, changes=tuple(changes), seconds=seconds)
        for looks in (False, True)
    )
    # With changes nothing is to be reproduced: one look is enough.
    wanted = [looking] if changes else [looking, plain, plain]
    with ThreadPoolExecutor(max_workers=jobs or os.cpu_count() or 1) as pool:
        looked, *told = pool.map(_run, wanted)
    refusals = [one["refusal"] for one in (*told, looked) if "refusal" in one]
    if refusals:
        raise CannotReplay(refusals[0])
    return _joined(capsule, looked, told or [looked], time.perf_counter() - began)


def _joined(capsule: Capsule, looked: Mapping[str, Any], told: Sequence[Mapping[str, Any]], seconds: float) -> Replay:
    return graded(
        capsule,
        _taken(told[0]),
        _taken(told[1]) if len(told) > 1 else None,
        told[0]["hints"],
        first_bad=operation_of(looked["first_bad"]),
        layers=shares_of(told[0]["layers"]),
        rows=shares_of(told[0]["rows"]),
        notes=tuple(looked["notes"]),
        seconds=seconds,
    )


def _taken(told: Mapping[str, Any]) -> Taken:
    return Taken(**{**told["taken"], "losses": tuple(told["taken"]["losses"])})


# ---- the process ----------------------------------------------------------------------------------------------------


def _run(job: _Job) -> dict[str, Any]:
    """What one run has told, or {"refusal": why it has not}."""
    with tempfile.TemporaryDirectory(prefix="isograd-replay-") as folder:
        out = Path(folder)
        context = process_context()
        if hasattr(context, "set_forkserver_preload"):
            ours = ("_rerun", "_launch", "frameworks.torch._script_replay")
            context.set_forkserver_preload([f"isograd.{name}" for name in ours])
        process = context.Process(target=_child, args=(job, out), daemon=False)
        process.start()
        try:
            process.join(job.seconds)
            is_late = process.is_alive()
        finally:
            end_process(process)
            process.join()
        with contextlib.suppress(OSError, ValueError):
            return dict(json.loads((out / "told.json").read_text(encoding="utf-8")))
        if is_late:
            return {"refusal": f"The step was not reached within {job.seconds:.0f} s."}
        words = last_words(out)
        return {"refusal": f"The script ended before the step was reached{f': {words}' if words else '.'}"}


def _child(job: _Job, out: Path) -> None:
    """In the new process: lead a group, be silent, run the script until the step is done."""
    from isograd._launch import run_attached

    be_alone(out)
    os.chdir(job.folder)  # the server that forks stays where it was started
    waiting: list[Any] = []

    def attach() -> None:
        from isograd.frameworks.torch._script_replay import ScriptReplay

        try:
            waiting.append(ScriptReplay(str(job.capsule), looking=job.looking, changes=job.changes, tell=tell))
            waiting[0].attach()
        except IsogradError as error:
            tell({"refusal": str(error)})

    def tell(facts: Mapping[str, Any]) -> None:
        # Written beside and renamed: who reads it while the process ends reads all of it.
        (out / "told").write_text(json.dumps(facts), encoding="utf-8")
        (out / "told").rename(out / "told.json")
        os._exit(0)

    status = run_attached(list(job.program.args), attach, module=job.program.module)
    if waiting and not status:
        tell({"refusal": waiting[0].missed()})
    sys.stderr.flush()
    os._exit(status)


# ---- a callable of the user's ---------------------------------------------------------------------------------------


def replay_callable(capsule: Capsule, target: str) -> Replay:
    """The step in this process. `target`: `module:callable` or `file.py:callable`; called without arguments, it returns
    (model, step_fn) or (model, step_fn, optimizer).

    Raises ScriptError or CannotReplay, in one sentence.
    """
    from isograd._errors import ScriptError
    from isograd._preflight import named_callable

    made: Any = _called(named_callable(target), target)
    if not isinstance(made, tuple) or len(made) not in (2, 3) or not callable(made[1]):
        raise ScriptError(f"{target} has to return (model, step_fn) or (model, step_fn, optimizer).")
    model, step_fn, optimizer = (*made, None)[:3]
    try:
        return capsule.replay(step_fn, model=model, optimizer=optimizer)  # type: ignore[no-any-return]
    except ValueError as error:
        raise CannotReplay(f"{target}: {error}") from None


def _called(function: Callable[[], Any], target: str) -> Any:
    from isograd._errors import ScriptError

    try:
        return function()
    except (Exception, SystemExit) as error:
        said = " ".join(str(error).split())[:300]
        raise ScriptError(f"{target} raised {type(error).__name__}: {said}; it is called without arguments.") from error
