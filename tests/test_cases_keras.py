"""The Keras programs of the scoreboard: each says what it is, and the scorer keeps them apart from the PyTorch ones."""

import dataclasses
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from isograd.rules import RULES

CASES = Path(__file__).parents[1] / "cases"
sys.path.append(str(CASES))
baselines, catalog, judge, record, score, tables = map(
    importlib.import_module, ("baselines", "catalog", "judge", "record", "score", "tables")
)

ALL = {case.name: case for case in catalog.read_keras_cases()}
TWINS = {case.name: case for case in catalog.read_cases()}


# ---- the programs --------------------------------------------------------------------------------------------------


def test_there_are_24_faults_and_4_controls():
    """Faults that Keras users reported have their program in Keras, beside healthy programs that look alarming."""
    assert (24, 4) == (sum(bool(c.accepted) for c in ALL.values()), sum(not c.accepted for c in ALL.values()))


@pytest.mark.parametrize("name", ALL)
def test_keras_program_is_scored_like_its_pytorch_twin(name):
    """The same causes count as right for the same fault, whatever the framework, and all of them are rules."""
    case, twin = ALL[name], TWINS[name]

    assert (twin.accepted, twin.harmless, bool(twin.unreachable)) == (
        case.accepted,
        case.harmless,
        bool(case.unreachable),
    )
    assert [] == [cause for cause in case.accepted if cause not in RULES]


@pytest.mark.parametrize("name", ALL)
def test_programs_say_what_they_are(name):
    """A fault's docstring tells what was seen, cause, fix, source, certainty and repair; a control's why it is none."""
    docstring = ALL[name].script.read_text(encoding="utf-8").split('"""')[1]
    words = ("Seen", "Cause", "Fix", "Source", "Sure", "Repaired") if ALL[name].accepted else ("Scary", "Healthy")

    assert [*words] == re.findall(r"^([A-Z][a-z]+)  +\S", docstring, re.MULTILINE)


@pytest.mark.parametrize("name", ALL)
def test_programs_train_with_keras(name):
    """They are Keras scripts that choose no backend themselves; what uses TensorFlow directly is run on it."""
    text = ALL[name].script.read_text(encoding="utf-8")

    assert "import keras\n" in text
    assert "torch" not in text.split('"""')[2]
    assert "KERAS_BACKEND" not in text
    assert "import tensorflow" not in text or "tensorflow" == ALL[name].backend


def test_backend_is_tensorflow_unless_a_program_names_another():
    """Faults that Keras heals on TensorFlow are run on JAX."""
    assert {"softmax_before_cross_entropy", "softmax_over_one_unit"} == {
        name for name, case in ALL.items() if case.backend == "jax"
    }
    assert {"jax", "tensorflow"} == {case.backend for case in ALL.values()}
    assert {""} == {case.backend for case in TWINS.values()}


# ---- the scorer ----------------------------------------------------------------------------------------------------


def test_program_gets_a_fresh_interpreter_with_its_backend(tmp_path, monkeypatch):
    """A Keras program is run with its backend, one thread, in its folder, and without isograd's own variables."""
    script = tmp_path / "program.py"
    script.write_text(
        "import os, sys\n"
        "shown = 'KERAS_BACKEND', 'TF_NUM_INTRAOP_THREADS', 'ISOGRAD_X'\n"
        "print(*map(os.environ.get, shown), os.getcwd(), *sys.argv[1:])\n"
        "print('repaired: no (loss 1)')\n"
        "sys.exit(3)\n"
    )
    monkeypatch.setattr(catalog, "KERAS", tmp_path)
    monkeypatch.setenv("ISOGRAD_X", "1")
    case = catalog.Case(name="program", accepted=("x",), backend="jax")
    job = catalog.Job(case=case, variant="fixed", seed=7)
    ((_, problem),) = record.record([job], tmp_path / "runs")
    folder = job.folder(tmp_path / "runs")

    assert "ended with status 3" in problem
    assert f"jax 1 None {folder} --seed 7 --fixed" in (folder / "output.txt").read_text()


def test_tables_tell_the_backend():
    """The Keras page links the Keras programs, marks those on another backend, and names what they were run on."""
    some = {name: ALL[name] for name in ("quartic_regression", "softmax_over_one_unit", "random_labels")}
    outcomes = [
        judge.Outcome(
            case=name, variant=variant, seed=0, steps=9, causes=(), alarm_after=None,
            flagged=dict.fromkeys(baselines.BASELINES),
        )
        for name, case in some.items()
        for variant in case.variants
    ]  # fmt: skip
    page, results = tables.document(outcomes, some), score.results(outcomes, some)

    assert "Written by `make cases-keras`: 2 training programs" in page
    assert "[quartic_regression](programs/keras/quartic_regression.py) |" in page
    assert "[softmax_over_one_unit](programs/keras/softmax_over_one_unit.py) on jax |" in page
    assert {"keras", "tensorflow-cpu", "jax"} < set(results)
    assert "torch" not in results


def test_pytorch_page_is_as_it_was():
    """The page of the PyTorch programs says nothing of Keras."""
    outcomes = [
        dataclasses.replace(
            judge.Outcome(case="quartic_regression", variant="faulty", seed=0, steps=9, causes=(), alarm_after=None),
            flagged=dict.fromkeys(baselines.BASELINES),
        )
    ]
    page = tables.document(outcomes, {"quartic_regression": TWINS["quartic_regression"]})

    assert "Written by `make cases`: 1 training programs" in page
    assert "[quartic_regression](programs/quartic_regression.py) |" in page
    assert "keras" not in page.lower()


def test_only_named_programs_are_scored(tmp_path):
    """`--keras` asks for the Keras programs, and a name that none of them has is told in a sentence."""
    command = [sys.executable, CASES / "score.py", "--keras", "--rescore", "--root", tmp_path, "--only", "focal"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert (2, "no program is called focal\n") == (done.returncode, done.stderr)
