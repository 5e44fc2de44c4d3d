"""Watch a training program: joins observing and recording. The one place where an error of ours is caught."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from isograd._capsule_folder import Limits
from isograd._changes import CannotApply, Change, SetHyperparameter
from isograd._diagnose import Diagnosis, diagnose
from isograd._errors import RunNotFound
from isograd._guard import Guard
from isograd._history import Event, History
from isograd._record import RunFile
from isograd._remedy import Treatment
from isograd._rule import Options
from isograd._runs import Run
from isograd._schedule import Schedule
from isograd.frameworks import check_guard, framework_of, imported, load

if TYPE_CHECKING:
    from types import FrameType

    from isograd._notebook import LiveCard

T = TypeVar("T")


class Shield:
    """Runs isograd's code inside the user's program: times it, and lets nothing out.

    The first exception switches it off for good, tells `on_failure` one sentence, and training goes on. Code in a
    forked child (a data-loading worker) is not ours to watch and is left alone.
    """

    def __init__(self, on_failure: Callable[[str], None]) -> None:
        self.seconds = 0.0
        self.is_down = False
        self._on_failure = on_failure
        self._process = os.getpid()
        self._inside: int | None = None  # the thread that is in our code; devices run backward on threads of their own

    def call(self, function: Callable[..., T], *args: Any) -> T | None:
        """`function(*args)`, or None when it failed, now or before."""
        if self.is_down or os.getpid() != self._process:
            return None
        if self._inside == threading.get_ident():
            return function(*args)
        self._inside, start = threading.get_ident(), time.perf_counter()
        try:
            return function(*args)
        except Exception as error:
            self._fail(error)
            return None
        finally:
            self._inside = None
            self.seconds += time.perf_counter() - start

    def _fail(self, error: Exception) -> None:
        self.is_down = True
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(place.filename).name}:{place.lineno}"
        with contextlib.suppress(Exception):
            what = " ".join(str(error).split())[:500]
            self._on_failure(f"{type(error).__name__}: {what} ({where})")


class Watch:
    """A run that is being watched. Made by `watch`; a context manager; every method may be called during the run."""

    def __init__(
        self,
        models: tuple[Any, ...],
        optimizers: tuple[Any, ...],
        *,
        framework: str = "torch",
        out: Path,
        every: int,
        budget: float,
        meta: Mapping[str, Any],
        on_step: Callable[[str, int, dict[str, float]], None] | None = None,
        between: Callable[[], None] | None = None,
        options: Options | None = None,
        frame: FrameType | None = None,
        changes: Sequence[Change] = (),
        on_refusal: Callable[[str], None] | None = None,
        guard: Guard | None = None,
        others: Sequence[object] = (),
    ) -> None:
        self._shield, self._guard_shield = Shield(self._detached), Shield(self._unguarded)
        check_guard(framework, guard)
        described = {"rank": 0, **load(framework).describe_run()}
        facts = {"framework": framework, **described, "every": every, "budget": budget, "state": "running", **meta}
        self.reports = facts["rank"] == 0
        self._file = RunFile.create(out, meta=facts, on_failure=_warn, in_memory=facts["rank"] > 0)
        self._options, self._on_step = options or {}, on_step
        self._is_open = True
        self.step = 0
        self._make_schedule: Callable[[], Schedule] = lambda: Schedule(every=every, budget=budget)
        self._between, self._changes, self._on_refusal = between, tuple(changes), on_refusal or _warn
        self._things = models, optimizers
        self._untold: list[tuple[str, dict[str, Any]]] = []
        self._parts: list[tuple[str, Any]] = []  # (framework, its observer)
        self._appliers: list[Any] = []
        self._started = time.perf_counter()
        self._flight: Any = None
        self._live: LiveCard | None = None
        self._guard, self._guarding = guard, None
        self._join(framework, models, optimizers, frame)
        if guard is not None and framework == "torch":
            self._guarding = self._begin_guarding(guard, others)

    def join(self, framework: str) -> None:
        """Watch everything that another framework trains in this process, too."""
        facts = load(framework).describe_run()
        self._file.set_meta(**{key: value for key, value in facts.items() if key not in ("rank", "framework")})
        self._join(framework, (), (), None)
        if self._guard is not None and framework == "torch":
            self._guarding = self._begin_guarding(self._guard, ())

    def _join(
        self, framework: str, models: tuple[Any, ...], optimizers: tuple[Any, ...], frame: FrameType | None
    ) -> None:
        module = load(framework)
        more: dict[str, Any] = {"on_warning": _warn} if framework in ("keras", "tensorflow") else {}
        if self._guard is not None and framework != "torch":
            more["guard"] = self._possible_guard(framework)
        observer = module.Observer(
            self._file,
            self._shield,
            models=models,
            optimizers=optimizers,
            make_schedule=self._make_schedule,
            on_step=self._stepped,
            between=self._between,
            **more,
        )
        self._parts.append((framework, observer))
        make = getattr(module, "Applier", None)
        applier = None if make is None else make(self._changes, on_event=self._note_change, on_refusal=self._on_refusal)
        if applier is not None and self._changes:
            self._appliers.append(applier)
            applier.listen()
        self._shield.call(observer.attach, models, optimizers, frame)
        if applier is not None:
            applier.listen_last()

    def _possible_guard(self, framework: str) -> Guard | None:
        try:
            check_guard(framework, self._guard)
        except ValueError as error:
            _warn(f"{error}; it is not guarded.")
            return None
        return self._guard

    @property
    def _observer(self) -> Any:
        """That of the framework whose program this is."""
        return next((observer for _, observer in self._parts if observer.subjects), self._parts[0][1])

    @property
    def _subjects(self) -> list[str]:
        return [name for _, observer in self._parts for name in observer.subjects]

    @property
    def taken(self) -> int:
        """Steps that have been taken; the last of them may not have been read yet."""
        return max(self.step, *(getattr(observer, "taken", 0) for _, observer in self._parts))

    def _begin_guarding(self, guard: Guard, others: Sequence[object]) -> Any:
        from isograd.frameworks.torch import FlightRecorder, Guarding

        models, optimizers = self._things
        observer = next(one for framework, one in self._parts if framework == "torch")
        if guard.capsules:
            limits = Limits(number=guard.capsules)
            self._flight = FlightRecorder(self.path, limits=limits, on_warning=_warn, shield=self._guard_shield)
        guarding = Guarding(
            guard,
            self._guard_shield,
            models=models,
            only=optimizers,
            on_event=self._note_guard,
            on_warning=_warn,
            reading_of=observer.reading_of,
            place_of=observer.place_of,
            clips=lambda: observer.clips,
            flight=self._flight,
            later=self._facts_of_run,
            others=others,
            lower=lambda factor: self.apply(SetHyperparameter(name="lr", factor=factor)),
        )
        self._guard_shield.call(guarding.listen)
        return guarding

    def _facts_of_run(self) -> dict[str, Any]:
        """What a capsule keeps of the run so far. Called on the thread that writes it."""
        run = self._file.read()
        found = diagnose(run.histories, run=run.id, options=self._options)
        return {"diagnosis": found.to_dict(), "command": list(sys.argv), "statistics": _last_rows(run.histories)}

    def _note_guard(self, kind: str, data: dict[str, Any], place: tuple[str, int] | None) -> None:
        if place is not None and place[0] in self._subjects:
            subject, step = place
            self._file.write_event(subject, Event(step=step, kind=kind, data=data))
        else:
            self._note_change(kind, data)

    # ---- what the run shows -------------------------------------------------------------------------------------

    @property
    def path(self) -> Path | None:
        """The run folder; None where there is none (ranks other than 0, a folder that could not be made)."""
        return self._file.path

    @property
    def is_in_memory(self) -> bool:
        """Whether the run is kept in memory, not in its folder."""
        return self._file.is_in_memory

    @property
    def deep_step(self) -> int | None:
        """The last step at which the deep tier was read, None before the first."""
        return max((one.deep_step for _, one in self._parts if one.deep_step is not None), default=None)

    @property
    def overhead(self) -> float:
        """Share of wall time since the start that watching took, as a fraction."""
        return (self._shield.seconds + self._guard_shield.seconds) / max(time.perf_counter() - self._started, 1e-9)

    def run(self) -> Run:
        """Everything recorded so far."""
        if self._is_open:
            for _, observer in self._parts:
                self._shield.call(observer.drain)
        return self._file.read()

    def histories(self) -> tuple[History, ...]:
        """What was recorded so far, one `History` per subject."""
        return self.run().histories

    def diagnose(self) -> Diagnosis:
        """The diagnosis of what was recorded so far."""
        run = self.run()
        return diagnose(run.histories, run=run.id, overhead=self.overhead, options=self._options)

    def show(self) -> None:
        """In a notebook, show a card of this run below the cell: its verdict, its loss, its signal over depth.

        The card is replaced in place between steps, at most every 2 s, until the run is closed; the time for that is
        the watcher's own. Anywhere but in a notebook it does nothing.
        """
        from isograd._notebook import LiveCard

        if self._live is None and LiveCard.is_possible():
            self._live = LiveCard(self._drawn)
            self._shield.call(self._live.show)

    def _drawn(self) -> str:
        """The run as it stands in its file; what is still under way is not waited for."""
        from isograd._notebook import is_too_large, large_card, live_card

        size = 0 if self.path is None else (self.path / "run.db").stat().st_size
        if self._is_open and is_too_large(size):
            return large_card(f"{self.path.name if self.path else ''}, {self.step} steps so far")
        run = self._file.read()
        found = diagnose(run.histories, run=run.id, overhead=self.overhead, options=self._options)
        return live_card(run, found)

    def _repr_html_(self) -> str:
        return self._drawn()

    # ---- treating -----------------------------------------------------------------------------------------------

    def apply(self, treatment: Treatment | Change | Sequence[Change]) -> Callable[[], tuple[str, ...]]:
        """Change the running program, from the next forward pass on: its optimizers and models, or those being watched.

        Returns `undo`, which takes it back at any later time, in any order. What acts at backward passes and steps
        (clipping, rates, schedules, penalties, scaling, zeroing, skipping) leaves no trace: with weights and optimizer
        state as they were, training goes on in the same bits as without it. What stays is returned by `undo()`, a
        sentence each, and nothing where no step has been taken: weights that were drawn anew are not drawn back, and
        weights that were trained with another activation, normalization, shortcut or scale of the data were trained so.

        Everything done and undone is an event of the run file ("treatment-applied", "treatment-undone",
        "bad-step-skipped"). What only a forward pass shows to have no place (a function that is never called) is taken
        back before the next step and said on stderr ("treatment-refused"). When the watch is closed, what acts at steps
        ends, and models stay as they are until `undo()`.

        Raises CannotApply, a sentence, with nothing changed, where the program has no place for one of the changes,
        and where the watch is closed.
        """
        if not self._is_open:
            raise CannotApply("This run is over: there is nothing to change any more.")
        framework = next((name for name, one in self._parts if one.subjects), self._parts[0][0])
        make = getattr(load(framework), "Applier", None)
        if make is None:
            raise CannotApply(f"isograd cannot change a program of {framework} while it runs.")
        changes = treatment.changes if isinstance(treatment, Treatment) else treatment
        models, optimizers = self._things
        applier = make(
            changes if isinstance(changes, Sequence) else (changes,),
            on_event=self._note_change,
            on_refusal=_warn,
            models=models,
            optimizers=optimizers,
        )
        self._shield.call(self._observer.settle)
        applier.adopt_running()
        applier.listen()
        applier.listen_last()
        self._appliers.append(applier)
        self._shield.call(self._observer.redescribe)

        def undo() -> tuple[str, ...]:
            self._shield.call(self._observer.settle)
            left: tuple[str, ...] = applier.undo()
            self._shield.call(self._observer.redescribe)
            return left

        return undo

    def _note_change(self, kind: str, data: dict[str, Any]) -> None:
        self._untold.append((kind, data))
        if self._subjects:
            self._tell_changes(self._subjects[0])

    def _tell_changes(self, subject: str) -> None:
        untold, self._untold = self._untold, []
        for kind, data in untold:
            self._file.write_event(subject, Event(step=self.step, kind=kind, data=data))

    # ---- life -------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(error)

    def close(self, error: BaseException | None = None, **facts: Any) -> None:
        """Stop watching and finish the run file; `error` is what ended the run, if anything did. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        if error is not None and _is_clean_exit(error):
            error = None
        for applier in self._appliers:
            applier.stop()
        if self._guarding is not None:
            self._guarding.stop()
        if self._flight is not None:
            self._flight.close()  # what is being written asks the run file
        for _, observer in self._parts:
            observer.detach(error)
        self._tell_changes((self._subjects or ["model"])[0])
        if error is not None:
            with contextlib.suppress(Exception):  # an exception of the user's may fail to tell what it is
                self._note_end(error)
        ended = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._file.set_meta(
            **{"state": _state(error), "ended": ended, "steps": self.step, "overhead": self.overhead, **facts}
        )
        if self._live is not None:
            self._live.refresh(now=True)
        self._file.close()

    def discard(self) -> None:
        """Remove the run folder of a closed watch that saw nothing."""
        if self.path is not None and not self._is_open:
            shutil.rmtree(self.path, ignore_errors=True)

    def _note_end(self, error: BaseException) -> None:
        kind = "interrupted" if isinstance(error, KeyboardInterrupt) else "exception"
        data = {"type": type(error).__name__, "message": str(error)[:1000]}
        for subject in self._subjects or ["model"]:
            self._file.write_event(subject, Event(step=max(0, self.step - 1), kind=kind, data=data))

    def _stepped(self, subject: str, step: int, readings: dict[str, float]) -> None:
        if not self.step:
            self._first_step(next((name for name, one in self._parts if subject in one.subjects), ""))
        if self._untold:
            self._tell_changes(subject)
        self.step = max(self.step, step + 1)
        if self._on_step is not None:
            self._on_step(subject, step, readings)
        if self._live is not None:
            self._live.refresh()

    def _first_step(self, framework: str) -> None:
        """Of several frameworks that were imported, this one trains."""
        if len(self._parts) > 1 and framework:
            self._file.set_meta(framework=framework)
        if self._changes and framework and not hasattr(load(framework), "Applier"):
            self._on_refusal(f"isograd cannot change a program of {framework} from outside: nothing was applied.")

    def _detached(self, what: str) -> None:
        _warn(f"stopped watching at step {self.step} because of an error of its own, training goes on: {what}")
        for _, observer in self._parts:
            observer.release()
        for subject in self._subjects:
            self._file.write_event(subject, Event(step=self.step, kind="watch-detached", data={"message": what}))

    def _unguarded(self, what: str) -> None:
        _warn(f"stopped guarding at step {self.step} because of an error of its own, training goes on: {what}")
        if self._guarding is not None:
            self._guarding.stop()
        self._note_change("guard-detached", {"message": what})

    # ---- between runs -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What has been learned of the run, for a checkpoint: with it, protection does not start anew after a restart.

        Lists, numbers and strings, always under the same names.
        """
        guard = None if self._guarding is None else self._guarding.state_dict()
        watch = {name: state for _, one in self._parts for name, state in one.state_dict().items()}
        return {"schema": 1, "watch": watch, "guard": guard}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`. Raises ValueError for anything else."""
        if state.get("schema") != 1:
            raise ValueError("this is not the state_dict of a watch, or one of a newer isograd")
        for _, observer in self._parts:
            self._shield.call(observer.load_state_dict, state["watch"])
        if self._guarding is not None and state["guard"] is not None:
            self._guarding.load_state_dict(state["guard"])


class Off:
    """What `watch` returns under `ISOGRAD=off`: nothing is watched, nothing is written."""

    step = 0
    path = None
    overhead = 0.0

    def __enter__(self) -> Off:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def close(self, error: BaseException | None = None, **facts: Any) -> None:
        """Nothing to close."""

    def apply(self, treatment: Treatment | Change | Sequence[Change]) -> Callable[[], tuple[str, ...]]:
        """Nothing is changed."""
        return tuple

    def state_dict(self) -> dict[str, Any]:
        """Nothing has been learned: what a watch takes up without effect."""
        return {"schema": 1, "watch": {}, "guard": None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing is taken up."""

    def show(self) -> None:
        """Nothing to show."""

    def histories(self) -> tuple[History, ...]:
        """Empty: nothing was watched."""
        return ()

    def run(self) -> Run:
        """Raises RunNotFound: nothing was recorded."""
        raise RunNotFound("Nothing was recorded because ISOGRAD=off is set; unset it to watch.")

    def diagnose(self) -> Diagnosis:
        """Of nothing: no causes, and nothing measured."""
        return diagnose((), run="")


def watch(
    *things: Any,
    out: str | os.PathLike[str] | None = None,
    every: int | None = None,
    budget: float | None = None,
    guard: Guard | None = None,
) -> Watch | Off:
    """Watch models and optimizers while they train.

    `things`: modules and optimizers of PyTorch in any order, models of Keras, or monitors of optax chains
    (`isograd.frameworks.jax.monitor`); none at all watches everything that trains in this process. A model alone is
    watched with whatever optimizers hold its parameters. Anything else with `state_dict` and `load_state_dict`
    (an average of the weights, a data loader) belongs to what a guard goes back to. `out`: folder for run folders
    (`isograd-runs`). `every`: largest distance between deep readings in steps (100). `budget`: largest share of wall
    time that watching may take after its first 2 s, as a fraction (0.01). `guard`: what may be done at a bad step;
    without one, steps are only observed.

    Weights, optimizer state and random-number generators end in the same bits as without it. Raises ValueError for
    arguments that have no state, and for options out of range.
    """
    from isograd._settings import load_settings

    settings = load_settings(out=out, every=every, budget=budget)
    if not settings.enabled:
        return Off()
    framework, *more = [framework_of(things)] if things else imported()
    models, optimizers, others = load(framework).sort(things)
    run = Watch(
        models,
        optimizers,
        framework=framework,
        out=settings.out,
        every=settings.every,
        budget=settings.budget,
        meta={"command": list(sys.argv), "script": Path(sys.argv[0]).name if sys.argv else ""},
        options=settings.rules,
        frame=sys._getframe(1),
        guard=guard,
        others=others,
    )
    for other in more:
        run.join(other)
    return run


def _last_rows(histories: Sequence[History]) -> dict[str, Any]:
    """Gradient norms of each parameter over the last steps, for what is usual."""
    found: dict[str, Any] = {}
    for history in histories:
        series = history.series.get("grad_norm")
        if series is not None:
            rows = series.values[-_USUAL:].T.tolist()
            found |= {parameter.name: row for parameter, row in zip(history.parameters, rows, strict=True)}
    return {"grad_norm": found}


_USUAL = 16
"""Steps whose norms a capsule keeps beside the bad one's."""


def _is_clean_exit(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0)


def _state(error: BaseException | None) -> str:
    if error is None:
        return "finished"
    return "interrupted" if isinstance(error, KeyboardInterrupt) else "failed"


def _warn(sentence: str) -> None:
    with contextlib.suppress(Exception):
        print(f"isograd: {sentence}", file=sys.stderr)
