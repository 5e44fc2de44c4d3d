"""The public list: complete, alphabetical, documented, and in agreement with what type checkers see."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import isograd

SOURCE = Path(isograd.__file__)


def test_the_list_is_alphabetical():
    """`__all__` is sorted, capitals first, and names nothing twice."""
    assert sorted(set(isograd.__all__)) == isograd.__all__


@pytest.mark.parametrize("name", isograd.__all__)
def test_every_name_is_there(name):
    """Each public name can be reached, is the same at every access, and comes from isograd."""
    value = getattr(isograd, name)

    assert value is getattr(isograd, name)
    assert name == "__version__" or value.__module__.startswith("isograd.")


@pytest.mark.parametrize("name", [name for name in isograd.__all__ if name != "__version__"])
def test_every_name_is_documented(name):
    """Each public class and function has a docstring, and so has every public method of a class."""
    value = getattr(isograd, name)
    members = vars(value).items() if inspect.isclass(value) else []
    methods = [member for key, member in members if inspect.isfunction(member) and not key.startswith("_")]

    assert [] == [member.__qualname__ for member in (value, *methods) if not inspect.getdoc(member)]


def test_type_checkers_see_the_same_list():
    """The imports that only type checkers read, the table that delays them, and `__all__` agree."""
    tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
    checked = {
        alias.asname: node.module.removeprefix("isograd.")
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        for alias in node.names
    }

    assert checked == isograd._HOME
    assert set(isograd.__all__) == {*checked, "__version__"}


def test_dir_lists_what_is_public():
    """`dir(isograd)`, which completion reads, has every public name before any was used."""
    code = "import isograd; print(set(isograd.__all__) <= set(dir(isograd)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert "True\n" == done.stdout


def test_an_unknown_name_is_an_attribute_error():
    """A name that is not public fails as on any module."""
    with pytest.raises(AttributeError, match=r"^module 'isograd' has no attribute 'wacth'$"):
        isograd.wacth  # noqa: B018


def test_importing_brings_nothing_heavy():
    """`import isograd` alone imports neither NumPy nor a framework nor the terminal library."""
    code = "import sys, isograd; print({'numpy', 'torch', 'rich', 'click', 'sqlite3'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert "set()\n" == done.stdout


def test_a_run_can_be_opened_and_diagnosed(tmp_path, monkeypatch):
    """`open_run` and `diagnose` find the latest run, take a path, and agree with each other."""
    from isograd._history import Layer
    from isograd._record import RunFile

    monkeypatch.chdir(tmp_path)
    run = RunFile.create(tmp_path / "isograd-runs", meta={"overhead": 0.01})
    run.add_layers("model", [Layer(name="fc", kind="linear", position=0)])
    for step in range(5):
        run.write_row("model", step, "cheap", {"loss": 1.0 / (step + 1)})
    run.close()

    opened = isograd.open_run()
    assert [1.0 / (step + 1) for step in range(5)] == opened.histories[0]["loss"].values.tolist()
    assert (
        isograd.diagnose() == isograd.diagnose(opened) == isograd.diagnose(run.path) == isograd.diagnose(str(run.path))
    )
    assert (5, 0.01) == (isograd.diagnose().steps, isograd.diagnose().overhead)


def test_no_run_is_an_exception_of_ours(tmp_path, monkeypatch):
    """Where there is no run, RunNotFound is raised, which is an IsogradError."""
    monkeypatch.chdir(tmp_path)

    for verb in (isograd.open_run, isograd.diagnose):
        with pytest.raises(isograd.RunNotFound) as raised:
            verb()
        assert isinstance(raised.value, isograd.IsogradError)
