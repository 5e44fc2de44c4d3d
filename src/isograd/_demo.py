"""`isograd demo`: a guided tour on real data. It runs two small programs of its own through the command line.

What it prints about them is what `isograd run` and `isograd fix` say of any script; nothing here knows the outcome.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.syntax import Syntax
from rich.text import Text

from isograd._chart import depth_profile
from isograd._errors import IsogradError
from isograd._fix import Fix, fix
from isograd._recorded import diagnose, open_run
from isograd._runs import list_runs
from isograd._settings import load_settings
from isograd._terminal import show
from isograd._trial import Program
from isograd._trial_progress import StageProgress
from isograd._trial_table import FixTable

_PROGRAMS = Path(__file__).parent / "demo"
_SICK, _HEALTHY = _PROGRAMS / "deep_sigmoid.py", _PROGRAMS / "deep_relu.py"


def tour() -> int:
    """Run both programs, with what isograd says of each, and cure the sick one.

    Returns 0 if it tells the sick one from the healthy one and finds a treatment that was verified to help.

    Raises IsogradError where the tour cannot begin.
    """
    _check_installed()
    started = time.monotonic()
    _tell(
        _title("1  A network that does not learn"),
        "Twenty layers of sigmoid on scikit-learn's handwritten digits (1797 images of 8 x 8 pixels, ten classes).",
        _code(_SICK.read_text(encoding="utf-8"), "python"),
    )
    sick = _run(_SICK)
    _tell(
        _title("2  Its healthy twin"),
        "The same depth, data, seed and learning rate. What differs is the activation and its initialization:",
        _code(_difference(), "diff"),
    )
    healthy = _run(_HEALTHY)
    for history in open_run(healthy).histories:
        _tell(Padding(depth_profile(history) or Text(), (0, 0, 0, 2)))
    _tell(
        _title("3  What would cure it"),
        "The whole catalogue, tried side by side on the sick program, the best of it on seeds of its own:",
        Text(f"$ isograd fix --all {_SICK.name}", style="bold"),
    )
    found = _treated(_SICK)
    _tell(FixTable(fix=found))
    if found.best is not None:
        _tell(_title("4  The cure"), "The same program, unchanged, treated from outside:")
        _run(_SICK, *(part for text in found.trials[found.best].treatment.texts for part in ("--apply", text)))
    _tell(_title("5  Your turn"), _next_commands(sick), f"The tour took {time.monotonic() - started:.0f} s.")
    told_apart = not diagnose(sick).healthy and diagnose(healthy).healthy
    return 0 if told_apart and found.best is not None else 1


def _treated(program: Path) -> Fix:
    with StageProgress(sys.stderr) as progress:
        return fix(Program(args=(str(program),)), every=True, report=progress.report)


def _check_installed() -> None:
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("sklearn") is None:
        raise IsogradError("the demo needs PyTorch and scikit-learn: pip install 'isograd[demo]'")
    if not load_settings().enabled:
        raise IsogradError("ISOGRAD=off switches everything off, the demo included: unset it.")


def _run(program: Path, *options: str) -> Path:
    """`isograd run program`, speaking for itself on this terminal; returns the folder of its run."""
    root = load_settings().out
    before = {run.id for run in list_runs(root)}
    _tell(Text(" ".join(["$ isograd run", *options, program.name]), style="bold"))
    # Matrices of 64 x 64 gain nothing from a second thread, and lose much where another program uses the other core.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    status = subprocess.call([sys.executable, "-m", "isograd", "run", *options, str(program)], env=environment)
    new = [run.id for run in list_runs(root) if run.id not in before and Path(run.script).name == program.name]
    if status != 0 or not new:
        raise IsogradError(
            f"{program.name} ended with status {status} and left {len(new)} runs in {root}: the demo stops."
        )
    return root / new[-1]


def _difference() -> str:
    sick, healthy = (program.read_text(encoding="utf-8").splitlines()[1:] for program in (_SICK, _HEALTHY))
    lines = difflib.unified_diff(sick, healthy, n=0, lineterm="")
    return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def _next_commands(sick: Path) -> RenderableType:
    first = diagnose(sick).causes[0].finding.name if diagnose(sick).causes else "vanishing-gradients"
    commands = {
        f"isograd explain {first}": "what it means and how it is decided",
        f"isograd diagnose {sick.name} -v": "the first run again, everything told",
        "isograd ls": "all runs",
        "isograd fix train.py": "your own script: what helps it, measured",
        "isograd run train.py": "your own script, unchanged",
    }
    return Group(*(Text(f"  {command}\n      {meaning}") for command, meaning in commands.items()))


def _title(text: str) -> Text:
    return Text(text, style="bold underline")


def _code(source: str, language: str) -> RenderableType:
    return Padding(Syntax(source.rstrip(), language, theme="ansi_dark", background_color="default"), (0, 0, 0, 4))


def _tell(*parts: RenderableType) -> None:
    for part in parts:
        show(Group(Text(), part), sys.stdout)
