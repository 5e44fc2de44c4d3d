"""Run a training script exactly as Python would, and watch what it trains. It measures nothing and judges nothing.

isograd attaches at the moment when the script imports its framework: environment variables that the script sets before
that (thread counts, devices) work as without it.
"""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import io
import os
import runpy
import sys
import tempfile
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from isograd._changes import Change
from isograd._errors import BadStep, ScriptError
from isograd.frameworks import WATCHED, check_guard, load, with_companions

if TYPE_CHECKING:
    from isograd._guard import Guard
    from isograd._runs import Run
    from isograd._watch import Watch

_CANNOT = 2
_INTERRUPTED = 130  # 128 + SIGINT, as shells have it


class RunEnded(SystemExit):
    """Ends the script after the number of steps that was asked for; `finally` blocks and exit handlers run."""


@dataclass(frozen=True, kw_only=True)
class LaunchResult:
    """How a script ended.

    `run`: the folder of what was recorded, or the `Run` itself where no folder could be written; None when nothing was
    recorded, and then `note` says why in a sentence, unless other ranks report. `refused`: the script was ended at its
    first step because it has no place for one of the changes.
    """

    status: int
    run: Path | Run | None
    note: str | None = None
    refused: bool = False


@dataclass(kw_only=True)
class _Plan:
    """What a launch was asked to do; travels to processes that the script spawns."""

    script: str
    command: list[str]
    steps: int | None
    every: int
    seed: int | None
    out: Path
    budget: float
    changes: tuple[Change, ...] = ()
    guard: Guard | None = None
    seed_shift: int | None = None
    found: Path | None = None
    """A file in which spawned processes leave the paths of their run folders."""
    rank: int | None = None


def launch(
    args: Sequence[str],
    *,
    module: bool = False,
    steps: int | None = None,
    every: int = 100,
    seed: int | None = None,
    out: Path = Path("isograd-runs"),
    budget: float = 0.01,
    changes: Sequence[Change] = (),
    guard: Guard | None = None,
    seed_shift: int | None = None,
) -> LaunchResult:
    """Run `args[0]` (a script, or a module with `module`) with the rest as its arguments, in this process.

    `steps`: end it cleanly after so many optimizer steps. The other options are those of `watch`; `seed` seeds Python,
    NumPy and the framework first. `changes` are applied to what it trains; where there is no place for one of them, the
    script ends before its first step with status 2. `guard`: what may be done at bad steps. `seed_shift` seeds the
    generators with it and adds it to every seed that the script sets. Returns the script's own exit status, 1 after an
    uncaught exception (whose traceback is printed as Python does), 130 after Ctrl-C. Raises ScriptError if there is no
    such script or it does not compile.
    """
    program = _found(args[0], module)
    process = os.getpid()
    plan = _Plan(
        script=args[0] if module else Path(args[0]).name,
        command=["-m", *args] if module else list(args),
        steps=steps,
        every=every,
        seed=seed,
        out=out.absolute(),
        budget=budget,
        changes=tuple(changes),
        guard=guard,
        seed_shift=seed_shift,
    )
    with _notes(plan):
        session = _Session(plan)
        session.attach_at_import()
        status, error = _run(program, args, module)
        if os.getpid() != process:
            os._exit(status)  # a fork that ran off the end of the script: reporting is its parent's business
        _join_threads()
        recorded, num_steps = session.close(error)
        if session.refusal:
            note = f"{session.refusal} The script was ended."
            return LaunchResult(status=status, run=None, note=note, refused=True)
        if num_steps:
            return LaunchResult(status=status, run=recorded)
        spawned = _spawned_runs(plan)
        if spawned:
            return LaunchResult(status=status, run=spawned[0])
        note = "No optimizer step was seen, so there is nothing to diagnose: the script did not train."
        return LaunchResult(status=status, run=None, note=note)


def run_attached(args: Sequence[str], attach: Callable[[], None], *, module: bool = False) -> int:
    """Run `args[0]` as `launch` does, unwatched; `attach()` is called once it has imported torch. Its exit status.

    Raises ScriptError if there is no such script or it does not compile.
    """
    program = _found(args[0], module)
    if "torch" in sys.modules:
        attach()
    else:
        sys.meta_path.insert(0, _ImportHook("torch", attach))
    return _run(program, args, module)[0]


@contextlib.contextmanager
def _notes(plan: _Plan) -> Iterator[None]:
    """A file in which spawned processes say where they recorded; without one they are watched all the same."""
    try:
        handle, name = tempfile.mkstemp(prefix="isograd-")
    except OSError:
        yield
        return
    os.close(handle)
    plan.found = Path(name)
    try:
        yield
    finally:
        plan.found.unlink(missing_ok=True)


def _spawned_runs(plan: _Plan) -> list[Path]:
    if plan.found is None:
        return []
    return [Path(line) for line in plan.found.read_text(encoding="utf-8").splitlines() if line]


# ---- watching --------------------------------------------------------------------------------------------------


class _Session:
    """Everything between the framework's import and the end of the script."""

    def __init__(self, plan: _Plan) -> None:
        self._plan = plan
        self._watch: Watch | None = None
        self._finders: list[_ImportHook] = []
        self._progress: Any = None
        self.refusal = ""

    def attach_at_import(self) -> None:
        """Watch as soon as a framework has been imported, or at once if it has been already."""
        for module, framework in WATCHED.items():
            if module in sys.modules:
                self._attach(framework)
            else:
                self._finders.append(_ImportHook(module, partial(self._attach, framework)))
                sys.meta_path.insert(0, self._finders[-1])

    def _attach(self, framework: str) -> None:
        try:
            self._seed(framework)
            for name in with_companions(framework):
                if self._watch is None:
                    self._start(name)
                else:
                    self._watch.join(name)
        except Exception as error:  # whatever it is, the script must run
            print(f"isograd: cannot watch this run: {type(error).__name__}: {error}", file=sys.stderr)

    def _seed(self, framework: str) -> None:
        if framework == "jax":
            return  # whose programs make keys of seeds of their own
        if self._plan.seed is not None:
            load(framework).seed_generators(self._plan.seed)
        if self._plan.seed_shift is not None:
            load(framework).shift_seeds(self._plan.seed_shift)

    def _start(self, framework: str) -> None:
        from isograd._progress import Progress
        from isograd._watch import Watch

        plan = self._plan
        guard = plan.guard
        try:
            check_guard(framework, guard)
        except ValueError as error:
            print(f"isograd: {error}; this run is not guarded.", file=sys.stderr)
            guard = None
        self._watch = Watch(
            (),
            (),
            framework=framework,
            out=self._plan.out,
            every=self._plan.every,
            budget=self._plan.budget,
            meta={
                "command": self._plan.command,
                "script": self._plan.script,
                "seed": self._plan.seed,
                **({} if self._plan.rank is None else {"rank": self._plan.rank}),
            },
            on_step=self._stepped,
            between=self._end_if_over,
            changes=self._plan.changes,
            on_refusal=self._refuse,
            guard=guard,
        )
        if framework == "torch":
            from isograd.frameworks.torch import wrap_spawned

            wrap_spawned(lambda function: function if isinstance(function, _Spawned) else _Spawned(function, plan))
        if self._watch.reports and not self._plan.rank:
            self._progress = Progress(total=self._plan.steps)
            self._progress.start()

    def _stepped(self, subject: str, step: int, readings: dict[str, float]) -> None:
        if self._progress is not None and self._watch is not None:
            shown = readings["loss"], readings["global_grad_norm"], self._watch.overhead
            self._progress.update(step, *shown, deep=self._watch.deep_step)

    def _refuse(self, sentence: str) -> None:
        self.refusal = self.refusal or sentence

    def _end_if_over(self) -> None:
        if self.refusal:
            raise RunEnded(_CANNOT)
        if self._plan.steps is not None and self._watch is not None and self._watch.taken >= self._plan.steps:
            raise RunEnded(0)

    def close(self, error: BaseException | None) -> tuple[Path | Run | None, int]:
        """Finish the run file; an empty one leaves no folder.

        Returns where it is, or the run itself where no folder could be written (None on ranks that report nothing),
        and the number of steps seen.
        """
        for finder in self._finders:
            if finder in sys.meta_path:
                sys.meta_path.remove(finder)
        if self._progress is not None:
            self._progress.stop()
        if self._watch is None:
            return None, 0
        self._watch.close(error)
        if not self._watch.step:
            self._watch.discard()
        if self._watch.is_in_memory:
            return self._watch.run() if self._watch.reports else None, self._watch.step
        return self._watch.path, self._watch.step


class _ImportHook(importlib.abc.MetaPathFinder):
    """Calls back once, right after a module has been imported for the first time."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self._name, self._then, self._is_looking = name, then, False

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name or self._is_looking:
            return None
        self._is_looking = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._is_looking = False
        if spec is None or spec.loader is None:
            return None
        execute, then = spec.loader.exec_module, self._then

        def exec_module(module: types.ModuleType) -> None:
            if self in sys.meta_path:  # not before: to ask whether there is a module imports none
                sys.meta_path.remove(self)
            execute(module)
            then()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


# ---- processes that the script spawns ---------------------------------------------------------------------------


@dataclass
class _Spawned:
    """The function of a spawned process, watched there: what `torch.multiprocessing.spawn` is given in its place."""

    function: Callable[..., Any]
    plan: _Plan
    _: Any = field(default=None, repr=False)

    def __call__(self, index: int, *args: Any) -> Any:
        self.plan.rank = index
        session = _Session(self.plan)
        session.attach_at_import()
        error: BaseException | None = None
        try:
            return self.function(index, *args)
        except BaseException as raised:
            error = raised
            raise
        finally:
            path, num_steps = session.close(error)
            if index == 0 and isinstance(path, Path) and num_steps and self.plan.found is not None:
                with contextlib.suppress(OSError), self.plan.found.open("a", encoding="utf-8") as notes:
                    notes.write(f"{path.absolute()}\n")


# ---- running as Python does ---------------------------------------------------------------------------------------


def _check_module(name: str) -> None:
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError) as error:
        raise ScriptError(f"There is no module named {name}: {error}.") from None
    if spec is None:
        raise ScriptError(f"There is no module named {name}; check the name, or run from the folder that holds it.")


def check_script(name: str, *, module: bool) -> None:
    """Raise ScriptError if there is no such script or module, or it does not compile."""
    if module:
        _check_module(name)
    else:
        _load_script(name)


def _found(name: str, module: bool) -> types.CodeType | None:
    """The script to run, as `_load_script` has it. A module is only looked for, where Python looks for it first."""
    if not module:
        return _load_script(name)
    sys.path[0] = os.getcwd()
    _check_module(name)
    return None


def _load_script(name: str) -> types.CodeType | None:
    """The compiled script; None for a folder or archive with a `__main__.py`, which `runpy` runs."""
    path = Path(name)
    if not path.exists():
        raise ScriptError(f"There is no script {name}; check the path.")
    if path.is_dir():
        if not (path / "__main__.py").is_file():
            raise ScriptError(f"{name} is a folder without a __main__.py; name the script to run.")
        return None
    try:
        with io.open_code(str(path.absolute())) as source:
            content = source.read()
    except OSError as error:
        raise ScriptError(f"{name} cannot be read: {error.strerror}.") from None
    if content[:2] == b"PK":
        return None
    try:
        return compile(content, os.path.abspath(name), "exec", dont_inherit=True)
    except SyntaxError as error:
        where = f"{name}, line {error.lineno}" if error.lineno else name
        raise ScriptError(f"{where}: syntax error: {error.msg}.") from None
    except ValueError as error:
        raise ScriptError(f"{name} is not a Python script: {error}.") from None


def _run(program: types.CodeType | None, args: Sequence[str], module: bool) -> tuple[int, BaseException | None]:
    """(exit status, what ended the script if it was an exception)."""
    sys.argv = list(args)
    try:
        if module:
            runpy.run_module(args[0], run_name="__main__", alter_sys=True)
        elif program is None:
            del sys.path[0]
            runpy.run_path(args[0], run_name="__main__")
        else:
            sys.path[0] = os.path.dirname(os.path.realpath(args[0]))
            _execute(program, args[0])
    except SystemExit as error:
        return _status_of(error), error
    except KeyboardInterrupt as error:
        _print_traceback(error)
        return _INTERRUPTED, error
    except BadStep as error:  # it was asked for: where the script was at that moment tells nothing
        print(f"isograd: {error}", file=sys.stderr)
        return 1, error
    except BaseException as error:
        _print_traceback(error)
        return 1, error
    return 0, None


def _execute(code: types.CodeType, name: str) -> None:
    main = types.ModuleType("__main__")
    path = os.path.abspath(name)
    loader = importlib.machinery.SourceFileLoader("__main__", path)
    main.__dict__.update(__file__=path, __loader__=loader, __builtins__=__builtins__, __cached__=None)
    # It stays after the script has ended: exit handlers, threads and unpickling still look there.
    sys.modules["__main__"] = main
    exec(code, main.__dict__)


def _status_of(error: SystemExit) -> int:
    if error.code is None:
        return 0
    if isinstance(error.code, int):
        return error.code & 0xFF
    print(error.code, file=sys.stderr)
    return 1


def _print_traceback(error: BaseException) -> None:
    """As Python prints it: without the frames that led from isograd into the script."""
    trace = error.__traceback__
    ours = (__file__, runpy.__file__, "<frozen runpy>")
    while trace is not None and trace.tb_frame.f_code.co_filename in ours and trace.tb_next is not None:
        trace = trace.tb_next
    sys.excepthook(type(error), error.with_traceback(trace), trace)


def _join_threads() -> None:
    """Wait for the script's threads, as Python does at its end: first for those of executors, which it lets go."""
    executors = sys.modules.get("concurrent.futures.thread")
    if executors is not None:
        executors._python_exit()
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
