"""The figures are only as good as the way they are taken: the harness sees what is planted, and nothing else."""

import importlib
import json
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def paired(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("paired")


@pytest.fixture
def workloads(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("workloads")


def test_planted_delay_is_found(paired, workloads, tmp_path):
    """A variant that sleeps 5 ms a step costs 5 ms more, and its interval excludes no delay."""

    @contextmanager
    def plain(program, folder):
        yield workloads.Calls()

    @contextmanager
    def slow(program, folder):
        yield workloads.Calls(before_update=lambda: time.sleep(0.005))

    times = paired.interleave(
        lambda: workloads.loose_tensors(4), {"plain": plain, "slow": slow}, folder=tmp_path, seconds=0.5, min_rounds=20
    )
    added = paired.bootstrap(paired.median_difference, times["slow"], times["plain"])

    # sleep() may take longer than it was asked to, never less; a loaded machine adds milliseconds, not tens of them.
    assert 0.004 < added.low <= added.value <= added.high < 0.05


def test_rare_variants_sit_out(paired, workloads, tmp_path):
    """A variant for every third round has a time in a third of the rounds and NaN elsewhere."""

    @contextmanager
    def plain(program, folder):
        yield workloads.Calls()

    times = paired.interleave(
        lambda: workloads.loose_tensors(2),
        {"plain": plain, "rare": plain},
        folder=tmp_path,
        seconds=0,
        min_rounds=9,
        rare={"rare": 3},
    )

    assert [True, False, False] * 3 == np.isfinite(times["rare"]).tolist()
    assert np.isfinite(times["plain"]).all()


def test_copies_start_and_train_alike(workloads):
    """Two copies of a program compute the same losses: a comparison compares like with like."""

    def losses(program):
        found = []
        for index in range(3):
            found.append(program.loss(index).item())
            program.step(index, workloads.Calls())
        return found

    small = {"width": 12, "batch": 2, "context": 8}

    assert losses(workloads.gpt(**small)) == losses(workloads.gpt(**small))


def test_gpt_has_the_published_size(workloads):
    """The transformer that figures are quoted for has 13.8 million parameters."""
    assert round(sum(p.numel() for p in workloads.gpt().model.parameters()) / 1e6, 1) == 13.8


def test_intervals_hold_what_they_promise(paired):
    """Over repeated samples of a known ratio, the 95 % interval of the median ratio holds it 95 times in 100."""
    draw = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        base = draw.lognormal(0, 0.3, 40)
        watched = 1.05 * base * draw.lognormal(0, 0.05, 40)
        interval = paired.bootstrap(paired.median_ratio, watched, base, resamples=300)
        held += interval.low <= 1.05 <= interval.high

    # Binomial with p = 0.95, n = 200: 190 +- 3.1; four standard deviations, and bootstrap medians run a little wide.
    assert 177 <= held


def test_bench_writes_its_results(tmp_path):
    """The program measures the sections it is asked for and writes a table and the raw figures of each."""
    command = [sys.executable, BENCHMARKS / "bench.py", "--only", "size,import", "--scale", "0.02", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert 0 == done.returncode, done.stderr
    figures = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert {"machine", "size", "import"} == set(figures)
    assert all(row["bytes_per_1000_steps"] > 1000 for row in figures["size"])
    assert "## Run file" in (tmp_path / "RESULTS.md").read_text(encoding="utf-8")


def test_bench_refuses_an_unknown_section(tmp_path):
    """A section that does not exist is named in one sentence, with those that do."""
    command = [sys.executable, BENCHMARKS / "bench.py", "--only", "gpu", "--out", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)

    assert 2 == done.returncode
    assert "no section gpu; there are gpt, cnn" in done.stderr
