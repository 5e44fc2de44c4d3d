"""`isograd report`, and what `isograd fix` leaves for it."""

import json
import os
import re
import stat
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from isograd._cli import main
from isograd._diagnose import Diagnosis
from isograd._fix import POINTS, Curves
from isograd._fix_file import read_fix
from isograd._history import Layer, Parameter
from isograd._record import RunFile
from isograd._runs import list_runs, read_run
from isograd._verify import Arm
from isograd._whole_file import write_whole


def record(root, *, steps=50, layer="net.0", script="train.py"):
    file = RunFile.create(root, meta={"script": script})
    file.add_layers("model", [Layer(name=layer, kind="linear", position=0)])
    file.add_parameters("model", [Parameter(name=f"{layer}.weight", layer=layer, shape=(4, 4))])
    for step in range(steps):
        file.write_row("model", step, "cheap", {"loss": 1.0 / (1 + step), "loss_nonfinite": 0.0, "grad_norm": [1.0]})
        file.write_row("model", step, "deep", {"signal_norm": [1.0]})
    file.set_meta(state="finished", steps=steps)
    file.close()
    return file.path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def recorded(folder):
    return record(folder / "isograd-runs")


def said(capsys, *arguments):
    """(status, stdout, stderr)."""
    status = main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def data_in(page):
    """What the page carries."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(found)


def test_the_latest_run_gets_its_page_beside_it(capsys, recorded):
    status, out, err = said(capsys, "report")

    assert (status, err) == (0, "")
    assert out.strip() == os.path.relpath(recorded / "report.html")
    page = (recorded / "report.html").read_text(encoding="utf-8")
    assert data_in(page)["run"]["id"] == recorded.name
    assert sorted(path.name for path in recorded.iterdir()) == ["report.html", "run.db"]
    assert [run.id for run in list_runs(recorded.parent)] == [recorded.name]


def test_a_file_may_be_named_and_is_replaced(capsys, recorded, folder):
    (folder / "page.html").write_text("old")
    (folder / "page.html").chmod(0o640)

    assert said(capsys, "report", recorded.name[:15], "-o", "page.html") == (0, "page.html\n", "")
    assert "old" not in (folder / "page.html").read_text(encoding="utf-8")[:10]
    assert stat.S_IMODE((folder / "page.html").stat().st_mode) == 0o640
    assert sorted(path.name for path in folder.iterdir()) == ["isograd-runs", "page.html"]


def test_a_new_page_may_be_read_by_whom_the_mask_lets(capsys, recorded, folder):
    before = os.umask(0o027)
    try:
        said(capsys, "report", "-o", "page.html")
    finally:
        os.umask(before)

    assert stat.S_IMODE((folder / "page.html").stat().st_mode) == 0o640


def test_a_dash_is_stdout(recorded):
    command = [sys.executable, "-m", "isograd", "report", "-o", "-"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)

    assert (done.returncode, done.stderr) == (0, b"")
    assert data_in(done.stdout.decode("utf-8"))["run"]["steps"] == 50
    assert not (recorded / "report.html").exists()


@pytest.mark.parametrize("place", ["nowhere/page.html", ".", "isograd-runs", "page\0.html", "taken/page.html"])
def test_a_place_that_cannot_be_written_is_one_sentence(capsys, recorded, folder, place):
    (folder / "taken").write_text("a file")
    status, out, err = said(capsys, "report", "-o", place)

    assert (status, out) == (2, "")
    assert err.startswith(f"isograd: {place} cannot be written (")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert sorted(path.name for path in folder.iterdir()) == ["isograd-runs", "taken"]


def test_no_run_is_one_sentence(capsys, folder):
    status, out, err = said(capsys, "report")

    assert (status, out) == (2, "")
    assert err == "isograd: no run has been recorded in isograd-runs: `isograd run SCRIPT` records one\n"


def test_a_file_that_was_cut_short_shows_the_rest_and_says_so(capsys, folder):
    path = record(folder / "isograd-runs", steps=3000)
    database = path / "run.db"
    database.write_bytes(database.read_bytes()[: database.stat().st_size // 2])
    status, out, err = said(capsys, "report")

    assert status == 0
    assert "is damaged" in err
    assert "the page shows the rest" in err
    assert "is damaged" in data_in((folder / out.strip()).read_text(encoding="utf-8"))["run"]["damage"]


def test_a_run_of_no_steps_gets_a_page_that_says_so(capsys, folder):
    record(folder / "isograd-runs", steps=0)
    status, out, _ = said(capsys, "report")

    assert status == 0
    told = data_in((folder / out.strip()).read_text(encoding="utf-8"))
    assert told["verdict"]["headline"].startswith("This run holds no optimizer step")


def test_no_name_can_leave_its_place_in_the_page(capsys, folder):
    name = "</script><script>alert(1)</script>"
    record(folder / "isograd-runs", layer=name, script=name)
    _, out, _ = said(capsys, "report")
    page = (folder / out.strip()).read_text(encoding="utf-8")

    assert name not in page
    assert data_in(page)["subjects"][0]["layers"][0]["name"] == name


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fdopen", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"new")
    assert path.read_text() == "old"
    assert [one.name for one in tmp_path.iterdir()] == ["page.html"]


def test_a_link_is_followed_and_a_device_written_to(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "page.html").symlink_to(tmp_path / "real" / "page.html")
    write_whole(tmp_path / "page.html", b"new")
    write_whole(type(tmp_path)(os.devnull), b"new")

    assert (tmp_path / "page.html").is_symlink()
    assert (tmp_path / "real" / "page.html").read_bytes() == b"new"


# ---- what a fix leaves ----------------------------------------------------------------------------------------------

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
data = torch.randn(256, 8)
labels = (data[:, 0] > 0).long()
layers = []
for _ in range(12):
    layers += [nn.Linear(8, 8), nn.Sigmoid()]
model = nn.Sequential(*layers, nn.Linear(8, 2))
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
for step in range(40):
    batch = torch.randint(0, 256, (64,))
    loss = nn.functional.cross_entropy(model(data[batch]), labels[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
"""


@pytest.fixture(scope="module")
def fixed(tmp_path_factory):
    """(folder, what `isograd fix --json` said, its status, stderr) of a search for a small program."""
    folder = tmp_path_factory.mktemp("fix")
    (folder / "temp").mkdir()
    (folder / "train.py").write_text(textwrap.dedent(SCRIPT))
    command = [sys.executable, "-m", "isograd", "fix", "--json", "--steps", "40", "--seeds", "2", "train.py"]
    environment = {**os.environ, "TMPDIR": str(folder / "temp")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    return folder, json.loads(done.stdout), done.returncode, done.stderr


def test_a_fix_leaves_its_untreated_run_and_what_it_measured(fixed):
    folder, told, _, err = fixed
    (run,) = list_runs(folder / "isograd-runs")
    kept = read_fix(run.path)

    assert err == ""
    assert (run.state, run.steps, run.script) == ("finished", 40, "train.py")
    assert told["run"] == told["baseline"]["run"] == run.id
    assert sorted(path.name for path in run.path.iterdir()) == ["fix.json", "run.db"]
    assert [path.name for path in (folder / "isograd-runs").iterdir()] == [run.id]
    trials = [{key: value for key, value in trial.items() if key != "curves"} for trial in kept["trials"]]
    assert {**kept, "trials": trials} == told
    assert not list((folder / "temp").glob("isograd-trial*"))


def test_what_was_verified_has_a_curve_for_each_seed(fixed):
    folder, _, _, _ = fixed
    (run,) = list_runs(folder / "isograd-runs")
    verified = [trial for trial in read_fix(run.path)["trials"] if trial["pairs"] > 1]

    assert verified
    for trial in verified:
        curves = trial["curves"]
        assert len(curves["baseline"]) == len(curves["treated"]) == trial["pairs"]
        assert {len(curve) for curve in curves["baseline"] + curves["treated"]} == {len(curves["steps"])}
        assert len(curves["steps"]) <= POINTS


def test_the_page_after_a_fix_shows_what_was_tried(fixed, capsys, monkeypatch):
    folder, told, _, _ = fixed
    monkeypatch.chdir(folder)
    status, out, _ = said(capsys, "report", "-o", "-")

    assert status == 0
    shown = data_in(out)["fix"]
    assert [trial["outcome"] for trial in shown["trials"]] == [trial["outcome"] for trial in told["trials"]]
    assert not read_run(list_runs(folder / "isograd-runs")[0].path).damage


def arm(losses):
    return Arm(seed=1, losses=np.array(losses), diagnosis=Diagnosis(run="", subjects=(), steps=len(losses)))


def test_curves_are_medians_of_what_was_finite():
    losses = np.random.default_rng(0).normal(size=1000)
    losses[:7] = np.nan
    curves = Curves.of([arm(losses)], [arm(losses[:500])])
    first = 0
    for step, value, treated in zip(curves.steps, curves.baseline[0], curves.treated[0], strict=True):
        part = losses[first : step + 1]
        assert np.isnan(value) if np.isnan(part).all() else value == np.nanmedian(part)
        assert np.isnan(treated) == (first >= 500 or np.isnan(part).all())
        first = step + 1
    assert (len(curves.steps), first) == (POINTS, 1000)
    assert json.loads(json.dumps(curves.to_dict(), allow_nan=False))["baseline"][0][0] is None


def test_a_run_that_cannot_be_kept_is_one_warning(tmp_path):
    (tmp_path / "train.py").write_text(textwrap.dedent(SCRIPT).replace("range(40)", "range(3)"))
    (tmp_path / "isograd-runs").write_text("a file, no folder")
    command = [sys.executable, "-m", "isograd", "fix", "--steps", "3", "--seeds", "2", "--json", "train.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert done.stderr.count("\n") == 1
    assert "isograd-runs cannot be written" in done.stderr
    assert json.loads(done.stdout)["baseline"]["steps"] == 3
