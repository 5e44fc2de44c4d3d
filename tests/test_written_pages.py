"""What the written pages show is true: programs run, commands print what stands below them, numbers are measured."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PAGES = ["index", "tutorial", "guard", "frameworks", "theory", "folklore"]


@pytest.fixture(scope="session")
def docs(repository):
    return repository / "docs"


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{page}.md" for page in PAGES)])
def test_python_in_the_text_compiles(repository, name):
    """Every block of Python is Python."""
    for block in blocks((repository / name).read_text(encoding="utf-8"), "python"):
        compile(block, name, "exec")


def numbers_apart(text):
    """(the text's words, its numbers): other machines round otherwise."""
    number = r"(?<![\w.-])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?![\w.])"
    return re.sub(number, "#", text).split(), [float(found) for found in re.findall(number, text)]


def test_folklore_is_measured(docs):
    """Every snippet of the page prints what stands below it, up to rounding."""
    text = (docs / "folklore.md").read_text(encoding="utf-8")
    snippets = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```$)?", text, re.MULTILINE | re.DOTALL)
    names = {}
    for code, shown in snippets:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "folklore.md", "exec"), names)
        there, here = numbers_apart(shown), numbers_apart(printed.getvalue())

        assert there[0] == here[0]
        # What is shown in one digit may be the next one elsewhere.
        assert there[1] == pytest.approx(here[1], rel=0.5), code
    assert len(snippets) > 15


def told(text):
    """What a command says, without what differs from machine to machine: numbers, curves, bars, overhead."""
    text = re.sub(r"Watch\s+overhead.*?(?:\)|%)\.", "", text, flags=re.DOTALL)
    text = re.sub(r"^  loss  .*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\S*(?:\d|<run>)\S*|(?<=\s)[#+.:=*_-]+(?=\s)", "", text)
    return text.split()


@pytest.mark.parametrize("page", ["tutorial", "guard"])
def test_what_the_pages_show_was_printed(docs, page, tmp_path, monkeypatch):
    """The page's programs, given to the commands that stand below them, print what stands there."""
    text = (docs / f"{page}.md").read_text(encoding="utf-8")
    for block in blocks(text, "python"):
        if named := re.match(r"# (\w+\.py)", block):
            (tmp_path / named[1]).write_text(block, encoding="utf-8")
    monkeypatch.setenv("PATH", os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"])))
    monkeypatch.delenv("COLUMNS", raising=False)
    ran = 0
    for block in blocks(text, "console"):
        line, _, shown = block.partition("\n")
        command = line.removeprefix("$ ").replace("<run>", "*")
        # A search takes longer than all the rest, and which remedies a machine has time to try is its own.
        if not shown or command.startswith(("isograd fix", "isograd serve")):
            continue
        done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, timeout=120)

        assert sorted(told(shown)) == sorted(told(done.stdout + done.stderr)), command
        ran += 1
    assert ran >= 4
