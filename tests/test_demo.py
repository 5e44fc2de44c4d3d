"""The guided tour: it tells a sick network from its healthy twin on real data, in time, and says what it lacks."""

import os
import resource
import subprocess
import sys

import pytest

import isograd
from isograd._demo import _HEALTHY, _SICK

ABSENT = """
import importlib.util, sys
from isograd._cli import main
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {absent!r} else found(name, *rest)
sys.exit(main(["demo"]))
"""


@pytest.fixture(scope="module")
def tour(tmp_path_factory):
    """The tour, taken once: its folder, its process, and the processor seconds that it took."""
    folder = tmp_path_factory.mktemp("tour")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "isograd", "demo"], capture_output=True, text=True, cwd=folder, timeout=600
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return folder, done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_the_tour_ends_well(tour):
    """The tour ends with status 0: the sick network is found sick, the healthy one healthy, and a cure is verified."""
    _, done, _ = tour

    assert 0 == done.returncode, done.stderr
    verdicts = [line.split(",")[0].split(".")[0] for line in done.stderr.splitlines() if line.startswith("isograd: ")]
    assert ["isograd: not healthy", "isograd: healthy", "isograd: healthy"] == verdicts


def test_the_first_cause_is_the_activation(tour):
    """The sick network's first cause is saturating-activations, its signal vanishes; the healthy one has no cause."""
    folder, _, _ = tour
    sick, healthy, cured = (isograd.diagnose(path) for path in sorted((folder / "isograd-runs").iterdir()))

    assert "saturating-activations" == sick.causes[0].finding.name
    assert "vanishing-gradients" in [symptom.name for symptom in sick.causes[0].symptoms]
    assert () == healthy.at_least("warning")
    assert () == cured.at_least("warning")


def test_one_learns_and_the_other_does_not(tour):
    """The accuracy on unseen digits that the programs print is chance for the one, far above it for the healthy one,
    and for the sick one once it is treated by what the tour found.
    """
    _, done, _ = tour
    told = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("accuracy on digits")]
    sick, healthy, cured = (float(accuracy.rstrip("%")) for accuracy in told)

    # Chance on 297 images: 10 % with a standard error of 1.7 %.
    assert sick < 20
    assert healthy > 85
    assert cured > 85


def test_the_tour_shows_the_programs(tour):
    """Every line of the first program is shown, and every line in which the second one differs."""
    _, done, _ = tour
    shown = {line.strip() for line in done.stdout.splitlines()}
    first, second = (program.read_text(encoding="utf-8").splitlines() for program in (_SICK, _HEALTHY))

    assert set() == {line.strip() for line in first} - shown
    assert set() == {f"+{line}" for line in second[1:] if line not in first} - shown


def test_commands_of_the_tour_exist(tour):
    """Each command that the tour ends with works in the folder where it was taken."""
    folder, done, _ = tour
    commands = [
        line.split()[1:]
        for line in done.stdout.splitlines()
        if line.startswith("  isograd ") and "train.py" not in line
    ]

    statuses = [
        subprocess.run(
            [sys.executable, "-m", "isograd", *command], capture_output=True, cwd=folder, timeout=60
        ).returncode
        for command in commands
    ]
    assert ["explain", "diagnose", "ls"] == [command[0] for command in commands]
    assert [0, 1, 0] == statuses


def test_the_tour_takes_less_than_three_minutes(tour):
    """The tour takes less processor time than two cores have in 180 s, whatever else the machine does."""
    _, _, seconds = tour

    assert seconds < 360


@pytest.mark.parametrize("absent", ["torch", "sklearn"])
def test_what_is_missing_is_told(tmp_path, absent):
    """Without PyTorch or scikit-learn one sentence gives the command that installs them."""
    done = subprocess.run(
        [sys.executable, "-c", ABSENT.format(absent=absent)], capture_output=True, text=True, cwd=tmp_path, timeout=60
    )

    assert (2, "") == (done.returncode, done.stdout)
    assert "isograd: the demo needs PyTorch and scikit-learn: pip install 'isograd[demo]'\n" == done.stderr


def test_no_tour_when_off(tmp_path):
    """With ISOGRAD=off there is nothing to show, and the tour says so."""
    done = subprocess.run(
        [sys.executable, "-m", "isograd", "demo"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "ISOGRAD": "off"},
    )

    assert (2, "") == (done.returncode, done.stdout)
    assert "ISOGRAD=off" in done.stderr
