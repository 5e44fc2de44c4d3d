"""What the design promises about the code as a whole, read from the code itself."""

import ast
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import requires, version
from pathlib import Path

import pytest

import isograd

SOURCE = Path(isograd.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FRAMEWORKS = {"torch", "keras", "tensorflow", "jax", "flax", "lightning", "transformers", "ray"}

# Programs that a tour runs in a process of their own; nothing imports them.
PROGRAMS = SOURCE / "demo"

WITHOUT_FRAMEWORKS = f"""
import importlib, importlib.abc, pkgutil, sys

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {FRAMEWORKS!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
"""


def run_python(script, *, cwd=None):
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, timeout=120)


def imported(tree):
    """Top-level names of everything that a module imports, wherever in it the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.partition(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in {"importlib.import_module", "__import__"}:
            yield from (arg.value.partition(".")[0] for arg in node.args if isinstance(arg, ast.Constant))


def parsed(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def within(path, folder):
    return folder in path.parents


def test_every_module_outside_frameworks_imports_without_a_framework():
    """Where no framework is installed, isograd can be imported with all but `frameworks` and `callbacks`."""
    script = f"""{WITHOUT_FRAMEWORKS}
import isograd
seen = 0
for module in pkgutil.walk_packages(isograd.__path__, "isograd."):
    if not module.name.startswith(("isograd.frameworks.", "isograd.callbacks.", "isograd.demo", "isograd.__main__")):
        importlib.import_module(module.name)
        seen += 1
assert not {FRAMEWORKS!r} & set(sys.modules), "a framework was imported"
print(seen)
"""
    done = run_python(script)

    assert ("", 0) == (done.stderr, done.returncode)
    assert int(done.stdout) > 20


def test_rules_judge_a_hand_built_history_without_a_framework():
    """Where no framework is installed, the engine names a signal that vanishes and is silent where it does not."""
    script = f"""{WITHOUT_FRAMEWORKS}
import numpy as np
from isograd._diagnose import diagnose
from isograd._history import History, Layer, Parameter, Series

def history(decades_per_layer):
    names = [f"layers.{{i}}" for i in range(20)]
    steps = np.arange(200)
    depth = np.arange(19, -1, -1)
    signal = np.tile(10.0 ** (-2 - decades_per_layer * depth), (200, 1))
    moves = decades_per_layer == 0
    loss = 2.3 * np.exp(-steps / 50) if moves else np.full(200, 2.3026)
    return History(
        layers=tuple(Layer(name=n, kind="linear", type="Linear", position=i, units=64) for i, n in enumerate(names)),
        parameters=tuple(Parameter(name=n + ".weight", layer=n, shape=(64, 64)) for n in names),
        groups=({{"optimizer": "SGD", "lr": 0.1}},),
        series={{
            "loss": Series(steps, loss), "loss_nonfinite": Series(steps, np.zeros(200)),
            "global_grad_norm": Series(steps, np.sqrt((signal**2).sum(1))),
            "grad_norm": Series(steps, signal), "grad_max": Series(steps, signal / 64),
            "grad_nonfinite": Series(steps, np.zeros((200, 20))),
            "learning_rate": Series(steps, np.full((200, 1), 0.1)),
            "signal_norm": Series(steps, signal), "signal_max": Series(steps, signal / 64),
            "signal_nonfinite": Series(steps, np.zeros((200, 20))),
        }},
    )

def names(diagnosis):
    return {{n for c in diagnosis.causes for n in (c.finding.name, *(s.name for s in c.symptoms))}}

sick, healthy = diagnose([history(0.8)]), diagnose([history(0.0)])
print("vanishing-gradients" in names(sick), sick.healthy, "vanishing-gradients" in names(healthy), healthy.healthy)
"""
    done = run_python(script)

    assert ("", "True False False True\n") == (done.stderr, done.stdout)


def test_import_time():
    """`import isograd` takes less than 0.15 s: the best of several fresh interpreters, their own start excluded."""
    script = "import time; start = time.perf_counter(); import isograd; print(time.perf_counter() - start)"

    seconds = min(float(run_python(script).stdout) for _ in range(9))

    assert seconds < 0.15


def test_only_frameworks_import_frameworks():
    """No module outside `frameworks` names a deep-learning framework in an import, at the top or inside a function; a
    callback names the trainer that it is for.
    """
    offenders = [
        (path.relative_to(SOURCE).as_posix(), name)
        for path in FILES
        if not within(path, SOURCE / "frameworks") and not within(path, PROGRAMS)
        for name in imported(parsed(path))
        if name in FRAMEWORKS and not (within(path, SOURCE / "callbacks") and name == path.stem)
    ]

    assert [] == offenders


def test_a_forbidden_import_is_seen_wherever_it_stands():
    """The search for imports sees plain, dotted, delayed and computed ones."""
    code = "import os\ndef f():\n    import torch.nn\n    from jax import numpy\nimportlib.import_module('keras.ops')"

    assert {"os", "torch", "jax", "keras"} == set(imported(ast.parse(code)))


def test_nothing_draws_from_the_users_random_generators():
    """No module imports `random` or names NumPy's or torch's global generator; only launching, treating and the keeping
    of their states may.
    """
    # What is drawn for weights that a treatment asks for comes from a stream of its own; states are noted and put back.
    names = ("_seed", "torch/_seed", "torch/_initialization", "torch/_generators", "keras/_initialization")
    may_seed = {SOURCE / f"frameworks/{name}.py" for name in names}
    calls = re.compile(
        r"\bnp\.random\.|\bnumpy\.random\.|\btorch\.(manual_seed|seed|rand\w*|normal|bernoulli|multinomial)\("
    )
    offenders = [
        path.name
        for path in FILES
        if path not in may_seed and not within(path, PROGRAMS)
        if "random" in imported(parsed(path)) or calls.search(path.read_text(encoding="utf-8"))
    ]

    assert [] == offenders


@pytest.mark.parametrize("word", ["util", "utils", "helper", "helpers", "common", "core", "misc"])
def test_no_file_is_a_drawer(word):
    """No file or folder is named after the habit of putting things there."""
    assert [] == [path for path in SOURCE.rglob("*") if path.stem.strip("_").split("_")[-1] == word]


def test_no_class_is_named_after_managing():
    """No class is a Manager, Handler, Engine, Helper, Base or Mixin."""
    names = [node.name for path in FILES for node in ast.walk(parsed(path)) if isinstance(node, ast.ClassDef)]

    assert [] == [name for name in names if re.search(r"(Manager|Handler|Engine|Helper|Mixin)$|^Base[A-Z]", name)]
    assert "History" in names


def test_rules_are_frozen_keyword_only_dataclasses():
    """Every rule is a value whose options are given by name."""
    rules = [path for path in sorted((SOURCE / "rules").glob("*.py")) if path.name != "__init__.py"]
    decorators = {
        path.name: {
            ast.unparse(d) for node in parsed(path).body if isinstance(node, ast.ClassDef) for d in node.decorator_list
        }
        for path in rules
    }

    assert {path.name: {"dataclass(frozen=True, kw_only=True)"} for path in rules} == decorators
    assert len(rules) >= 18


def test_version_is_said_once_and_everywhere():
    """The package, its metadata and the change log's first heading name the same version."""
    changelog = Path(__file__).parents[1] / "CHANGELOG.md"

    assert version("isograd") == isograd.__version__
    assert (
        isograd.__version__
        == re.search(r"^## \[?(\d+\.\d+\.\d+)", changelog.read_text(encoding="utf-8"), re.MULTILINE)[1]
    )


def test_constraints_pin_every_dependency(repository):
    """Each requirement of pyproject.toml has its exact version in constraints.txt, and no line names a place."""
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [
        re.fullmatch(r"([A-Za-z0-9._-]+)==([0-9][^\s/+]*)( ;.*)?", line) for line in lines if not line.startswith("#")
    ]
    pinned = {pin[1].lower().replace("_", "-") for pin in pins}
    required = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in requires("isograd")}

    assert None not in pins
    assert set() == required - pinned - {"isograd"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory, repository):
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(repository)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert 0 == done.returncode, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_package(wheel):
    """A built wheel holds every source file, the type marker and the license, and nothing from tests or examples."""
    files = {
        path.relative_to(SOURCE.parent).as_posix() for path in SOURCE.rglob("*") if path.suffix in {".py", ".typed"}
    }
    names = set(zipfile.ZipFile(wheel).namelist())

    assert set() == files - names
    assert "isograd/py.typed" in names
    assert any(name.endswith("LICENSE") for name in names)
    assert {"isograd", wheel.name.split("-py3")[0] + ".dist-info"} == {name.partition("/")[0] for name in names}


def test_wheel_needs_no_framework(wheel):
    """What a wheel requires without an extra is NumPy, a file format, terminal and page, no deep-learning framework."""
    archive = zipfile.ZipFile(wheel)
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    required = Parser().parsestr(archive.read(metadata).decode()).get_all("Requires-Dist")

    assert {"click", "jinja2", "numpy", "plotly", "rich", "safetensors", "starlette", "tomli", "uvicorn"} == {
        re.match(r"[\w-]+", line)[0] for line in required if "extra ==" not in line
    }


def test_wheel_runs_where_it_is_unpacked(wheel, tmp_path):
    """The files of a wheel alone, without the repository, can be imported and answer `--version`."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    script = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import isograd
assert isograd.__file__.startswith({str(tmp_path)!r})
from isograd._cli import main
sys.argv = ["isograd", "--version"]
main()
"""
    done = run_python(script, cwd=tmp_path)

    assert (0, "") == (done.returncode, done.stderr)
    assert isograd.__version__ in done.stdout
