"""Capsules without a framework: whole or not at all on the disk, few enough, and harmless whoever wrote them."""

import json
import os
import random
import shutil
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import OrderedDict, UserDict, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from isograd import CapsuleUnreadable, _tree
from isograd._capsule import TENSORS, list_capsules, open_capsule
from isograd._capsule_folder import Limits, capsule_name, free_path, prune, sweep, write_capsule

FACTS = {
    "schema": 1,
    "run": "a-run",
    "subject": "model",
    "step": 118,
    "why": [{"channel": "loss", "layer": None, "observed": "nan", "limit": None}],
    "action": "skipped",
    "loss": "nan",
}


def facts(**changed):
    return {**FACTS, **changed}


def tensors(folder, size=10):
    for name in TENSORS:
        save_file({"a/b": np.arange(size, dtype=np.float32)}, folder / f"{name}.safetensors")


def put(run, step, *, channel="loss", observed=3.0, size=10, **changed):
    path = run / "capsules" / capsule_name(step)
    why = [{"channel": channel, "layer": None, "observed": _tree.number(observed), "limit": 1.0}]
    write_capsule(path, facts(step=step, why=why, **changed), lambda folder: tensors(folder, size))
    return path


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "a-run"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def capsule(run):
    return put(run, 118)


def refused(path):
    """The one sentence with which a capsule is refused, by opening it as by listing its run if only facts are bad."""
    with pytest.raises(CapsuleUnreadable) as caught:
        open_capsule(path)
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence and str(path) in sentence
    return sentence


def require_sentence(error, end="."):
    assert str(error).endswith(end) and "\n" not in str(error)


# ---- reading back ---------------------------------------------------------------------------------------------------


def test_what_was_written_is_read(run):
    """Step, subject, reasons, loss and tensors come back as they were written; numbers that JSON has not, too."""
    why = [{"channel": "grad_norm", "layer": "net.0", "observed": "inf", "limit": 2.5}]
    path = run / "capsules" / capsule_name(7, "discriminator")
    write_capsule(path, facts(step=7, subject="discriminator", why=why, loss=0.25), tensors)

    (found,) = list_capsules(run)

    assert found == open_capsule(path)
    assert path == run / "capsules" / "step-000007-discriminator"
    assert (7, "discriminator", 0.25, "skipped", "") == (
        found.step,
        found.subject,
        found.loss,
        found.action,
        found.damage,
    )
    assert ({"channel": "grad_norm", "layer": "net.0", "observed": float("inf"), "limit": 2.5},) == found.why
    assert {"grad_norm-nonfinite"} == found.kinds
    assert {"a/b": ("F32", (10,))} == found.tensors("batch")
    assert sum(file.stat().st_size for file in path.iterdir()) == found.bytes
    assert {f"{name}.safetensors" for name in TENSORS} | {"capsule.json"} == {file.name for file in path.iterdir()}


def test_a_run_without_capsules(run, tmp_path):
    """A run without capsules, or no run at all, has none."""
    assert () == list_capsules(run)
    assert () == list_capsules(tmp_path / "nowhere")


def test_the_same_step_twice(run):
    """After a rewind a step may be captured again: the second capsule stands beside the first."""
    first = put(run, 5)
    second = free_path(run / "capsules", "step-000005")
    third = free_path(run / "capsules", "step-000005", frozenset({second}))

    assert ("step-000005", "step-000005-2", "step-000005-3") == (first.name, second.name, third.name)


@pytest.mark.parametrize("subject", ["../../etc", "a b/c", "\x1b[31m", "é", "x" * 300, ".."])
def test_names_of_subjects_are_no_paths(subject):
    """Whatever a subject is called, its capsule's folder is one plain name."""
    name = capsule_name(3, subject)

    assert name.startswith("step-000003") and len(name) < 60
    assert Path(name).name == name and name.isascii() and name.isprintable()


def test_importing_isograd_stays_light():
    """`import isograd` and listing capsules import neither torch nor safetensors."""
    code = "import sys, isograd, isograd._capsule as c; c.list_capsules('.'); "
    code += "print({'torch', 'safetensors'} & {*sys.modules})"

    assert "set()" == subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


# ---- capsules that nobody should trust ------------------------------------------------------------------------------


MISSHAPEN = {
    "empty": b"",
    "truncated": json.dumps(FACTS).encode()[:-20],
    "not-text": bytes(range(256)),
    "a-list": b"[1, 2]",
    "a-number": b"7",
    "no-schema": json.dumps({**FACTS, "schema": None}).encode(),
    "schema-true": json.dumps({**FACTS, "schema": True}).encode(),
    "newer": json.dumps({**FACTS, "schema": 2}).encode(),
    "NaN": json.dumps({**FACTS, "loss": float("nan")}).encode(),
    "deep": b"[" * 100_000,
    "deep-facts": json.dumps(FACTS)[:-1].encode() + b', "settings": ' + b'{"a":' * 100_000,
    "long-integer": json.dumps(FACTS)[:-1].encode() + b', "x": ' + b"9" * 5000 + b"}",
    "step-text": json.dumps(facts(step="../../x")).encode(),
    "step-negative": json.dumps(facts(step=-1)).encode(),
    "step-huge": json.dumps(facts(step=2**70)).encode(),
    "step-float": json.dumps(facts(step=1.5)).encode(),
    "no-step": json.dumps({k: v for k, v in FACTS.items() if k != "step"}).encode(),
    "why-text": json.dumps(facts(why="because")).encode(),
    "why-numbers": json.dumps(facts(why=[1])).encode(),
    "observed-text": json.dumps(facts(why=[{**FACTS["why"][0], "observed": "much"}])).encode(),
    "subject-list": json.dumps(facts(subject=["model"])).encode(),
    "loss-list": json.dumps(facts(loss=[1])).encode(),
    "batches-object": json.dumps(facts(batches={})).encode(),
    "parameters-list": json.dumps(facts(parameters=[])).encode(),
    "pickle": b"\x80\x04\x95cos\nsystem\n(S'touch /tmp/hacked'\ntR.",
}  # fmt: skip


@pytest.mark.parametrize("text", MISSHAPEN.values(), ids=MISSHAPEN)
def test_misshapen_facts(run, capsule, text):
    """Facts that isograd did not write are refused in one sentence, and so does the list of the run's capsules say."""
    (capsule / "capsule.json").write_bytes(text)
    put(run, 200)

    sentence = refused(capsule)

    assert sentence.isprintable() and len(sentence) < 400
    assert [sentence, ""] == sorted((c.damage for c in list_capsules(run)), reverse=True)


def test_a_newer_format(capsule):
    """A capsule of a later format says what to do."""
    (capsule / "capsule.json").write_text(json.dumps(facts(schema=2)), encoding="utf-8")

    assert "newer isograd" in refused(capsule)


def test_facts_without_end(capsule):
    """A JSON of 70 MB is not read."""
    with (capsule / "capsule.json").open("wb") as file:
        file.truncate(70_000_000)

    assert "larger" in refused(capsule)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
KNOWN = sorted({*FACTS, "batches", "calls", "parameters", "optimizer", "generators", "modified", "settings", "scaler"})


@settings(max_examples=150)
@given(st.dictionaries(st.sampled_from(KNOWN), JSON, max_size=4), JSON)
def test_any_facts_at_all(tmp_path_factory, changed, reason):
    """Whatever JSON stands in a capsule: it is opened as what its fields say, or refused in one sentence."""
    folder = tmp_path_factory.mktemp("capsule", numbered=True)
    tensors(folder)
    (folder / "capsule.json").write_text(json.dumps({**FACTS, "why": [reason], **changed}), encoding="utf-8")
    try:
        found = open_capsule(folder)
    except CapsuleUnreadable as error:
        require_sentence(error)
    else:
        assert found.step >= 0 and found.subject.isprintable() and found.action.isprintable()
        assert all(isinstance(each["observed"], float) and each["channel"].isprintable() for each in found.why)
        assert isinstance(found.loss, float) and isinstance(found.facts["batches"], list)
    finally:
        shutil.rmtree(folder)


@settings(max_examples=150)
@given(st.binary(max_size=300))
def test_any_bytes_as_facts(tmp_path_factory, text):
    """Whatever bytes: one sentence."""
    folder = tmp_path_factory.mktemp("capsule", numbered=True)
    tensors(folder)
    (folder / "capsule.json").write_bytes(text)

    refused(folder)
    shutil.rmtree(folder)


def test_names_that_steer_terminals(capsule):
    """A subject that holds escape sequences is shown spelled out, and no longer than a line."""
    why = [{"channel": "\x1b]0;x\x07", "layer": "a\nb", "observed": 1, "limit": 2}]
    text = json.dumps(facts(subject="\x1b[2J" + "m" * 1000, action="\r\x1b[31mok", why=why))
    (capsule / "capsule.json").write_text(text, encoding="utf-8")

    found = open_capsule(capsule)

    shown = found.subject + found.action + found.why[0]["channel"] + found.why[0]["layer"]
    assert shown.isprintable() and len(found.subject) < 250


def header(entries, data=b""):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(shape, start, stop, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


HOSTILE = {
    "empty": b"",
    "seven-bytes": b"\x00" * 7,
    "header-longer-than-file": struct.pack("<Q", 1000) + b"{}",
    "header-of-16-exabytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "header-of-99-MB-declared": struct.pack("<Q", 99_000_000) + b"{}",
    "no-json": struct.pack("<Q", 4) + b"\xff\xfe\x00{",
    "a-list": struct.pack("<Q", 2) + b"[]",
    "huge-shape": header({"x": tensor([2**40, 2**40], 0, 4)}, b"1234"),
    "overflowing-shape": header({"x": tensor([2**63, 2**63, 4], 0, 4)}, b"1234"),
    "negative-shape": header({"x": tensor([-1], 0, 4)}, b"1234"),
    "shape-beyond-64-bits": header({"x": tensor([2**70], 0, 4)}, b"1234"),
    "offsets-outside": header({"x": tensor([1], 4000, 4004)}, b"1234"),
    "offsets-reversed": header({"x": tensor([1], 4, 0)}, b"1234"),
    "overlapping": header({"x": tensor([1], 0, 4), "y": tensor([1], 0, 4)}, b"1234"),
    "unknown-dtype": header({"x": tensor([1], 0, 4, "O")}, b"1234"),
    "truncated-data": header({"x": tensor([100], 0, 400)}, b"1234"),
    "data-left-over": header({"x": tensor([1], 0, 4)}, b"1234" * 100),
    "deep-header": struct.pack("<Q", 200_000) + b"[" * 200_000,
    "pickle": b"\x80\x04\x95\x1c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    "zip-with-a-pickle": b"PK\x03\x04" + b"\x00" * 100,
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_hostile_headers(run, capsule, data, name):
    """A safetensors file that is truncated, lies about its sizes or is another format is refused by its name."""
    (capsule / f"{name}.safetensors").write_bytes(data)

    assert f"{name}.safetensors" in refused(capsule)
    assert [""] == [c.damage for c in list_capsules(run)]  # a list of capsules looks at no tensors


@settings(max_examples=150)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_any_bytes_as_tensors(tmp_path_factory, data, length):
    """Whatever bytes stand in a safetensors file: a header or one sentence."""
    folder = tmp_path_factory.mktemp("capsule", numbered=True)
    tensors(folder)
    (folder / "capsule.json").write_text(json.dumps(FACTS), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", length) + data)
    try:
        assert isinstance(open_capsule(folder).tensors("model"), dict)
    except CapsuleUnreadable as error:
        require_sentence(error)
    shutil.rmtree(folder)


def test_names_of_tensors_are_no_paths(run, capsule):
    """A tensor called ../../x is a tensor with that name: nothing is written or read elsewhere."""
    before = sorted(run.parent.rglob("*"))
    save_file({"../../x": np.ones(3, np.float32), "/etc/passwd": np.ones(2)}, capsule / "model.safetensors")

    assert {"../../x": ("F32", (3,)), "/etc/passwd": ("F64", (2,))} == open_capsule(capsule).tensors("model")
    assert before == sorted(run.parent.rglob("*"))


@pytest.mark.parametrize("name", ["capsule.json", *(f"{name}.safetensors" for name in TENSORS)])
def test_missing_files(capsule, name):
    """A capsule with a file missing is named so."""
    (capsule / name).unlink()

    assert f"{name} is missing" in refused(capsule)


@pytest.mark.parametrize("kind", ["link", "dangling", "folder", "pipe", "device"])
@pytest.mark.parametrize("name", ["capsule.json", "model.safetensors", "generators.safetensors"])
def test_files_that_are_no_files(run, capsule, tmp_path, name, kind):
    """Links, which could lead anywhere, and pipes and devices, which never end, are not opened."""
    (capsule / name).rename(tmp_path / name)
    if kind == "link":
        (capsule / name).symlink_to(tmp_path / name)
    elif kind == "dangling":
        (capsule / name).symlink_to("/nowhere/at/all")
    elif kind == "folder":
        (capsule / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(capsule / name)
    else:
        (capsule / name).symlink_to("/dev/zero")

    assert "plain file" in refused(capsule)
    assert ["plain file" in c.damage for c in list_capsules(run)] == [True]


def test_links_among_the_capsules(run, capsule, tmp_path):
    """A link among the capsules of a run is none of them."""
    (run / "capsules" / "step-000999").symlink_to(capsule)
    (run / "capsules" / "step-000998").symlink_to("/")

    assert [118] == [c.step for c in list_capsules(run)]


def test_what_is_no_capsule(tmp_path):
    """A path to nothing, to a file, to an empty folder."""
    (tmp_path / "file").write_text("", encoding="utf-8")
    (tmp_path / "folder").mkdir()

    assert "no such folder" in refused(tmp_path / "nothing")
    assert "no such folder" in refused(tmp_path / "file")
    assert "missing" in refused(tmp_path / "folder")


SPY = """
import sys
seen = []
def hook(event, args):
    if event in ("exec", "compile", "import", "os.system", "subprocess.Popen", "socket.connect", "pickle.find_class"):
        seen.append((event, str(args)[:200]))
    if event == "open" and isinstance(args[1], str) and any(c in args[1] for c in "wxa+"):
        seen.append((event, str(args)[:200]))
from pathlib import Path
from isograd._capsule import list_capsules, open_capsule
import safetensors, numpy, json
list_capsules(sys.argv[1])
open_capsule(Path(sys.argv[1]) / "capsules" / "step-000118").tensors("model")
sys.addaudithook(hook)
for capsule in list_capsules(sys.argv[1]):
    open_capsule(capsule.path)
    [capsule.tensors(name) for name in ("model", "optimizer", "batch", "generators")]
seen = [each for each in seen if not (each[0] == "import" and each[1].split("'")[1] in sys.modules)]
print(seen)
"""


def test_no_code_is_run(run, capsule):
    """While capsules are listed and opened Python compiles, executes, imports, unpickles, starts and writes nothing."""
    tree = {"fields": [["x", {"opaque": "os.system"}]], "type": "os.system"}
    text = json.dumps(facts(batches=[tree], command=["rm", "-rf"], settings={"__reduce__": ["os.system", ["id"]]}))
    (capsule / "capsule.json").write_text(text, encoding="utf-8")

    done = subprocess.run([sys.executable, "-c", SPY, run], capture_output=True, text=True)

    assert ("[]\n", "") == (done.stdout, done.stderr)


# ---- the disk -------------------------------------------------------------------------------------------------------


WRITE = """
import sys, os, signal, resource
from pathlib import Path
import numpy as np
from safetensors.numpy import save_file
from isograd._capsule_folder import Limits, capsule_name, free_path, prune, sweep, write_capsule
from isograd._capsule import TENSORS
run = Path(sys.argv[1])
FACTS = {"schema": 1, "run": "r", "subject": "model", "why": [{"channel": "loss", "observed": 2.0, "limit": 1.0}]}
def tensors(folder):
    for name in TENSORS:
        save_file({str(i): np.full(20_000, i, np.float32) for i in range(5)}, folder / f"{name}.safetensors")
def write(step):
    path = free_path(run / "capsules", capsule_name(step))
    write_capsule(path, {**FACTS, "step": step}, tensors)
"""

FOREVER = (
    WRITE
    + """
print("ready", flush=True)
step = 100
while True:
    write(step)
    step += 1
    prune(run, Limits(number=6))
"""
)


def python(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_killed_at_any_moment(run):
    """kill -9 while capsules are written and removed in a loop, 25 times: every capsule left is whole, one of an
    earlier writer is untouched until it is its turn to make room, and what was left half done is swept.
    """
    draw, leftovers = random.Random(5), 0
    elsewhere = run.parent / "another-run"
    elsewhere.mkdir()
    old = put(elsewhere, 1)
    before = contents(old)
    for _ in range(25):
        process = python(FOREVER, run)
        assert "ready\n" == process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.12))
        process.kill()
        process.communicate()
        found = list_capsules(run)
        assert all(not capsule.damage for capsule in found)
        for capsule in found:
            assert {"0", "1", "2", "3", "4"} == {*open_capsule(capsule.path).tensors("model")}
            assert (capsule.path / "optimizer.safetensors").stat().st_size > 400_000
        leftovers += sum(path.name.startswith(".") for path in (run / "capsules").glob("*"))
        sweep(run.parent)
        assert not [path for path in (run / "capsules").glob("*") if path.name.startswith(".")]
        assert [c.path for c in found] == [c.path for c in list_capsules(run)]
    assert leftovers > 0
    assert before == contents(old)


def test_sweeping_leaves_the_living_alone(run):
    """What a process that still runs is writing stays, whatever run it belongs to; a link is never followed."""
    code = WRITE + """
    def slow(folder):
        tensors(folder)
        print("writing", flush=True)
        sys.stdin.readline()
    write_capsule(run / "capsules" / "step-000001", {**FACTS, "step": 1}, slow)
    """.replace("\n    ", "\n")  # fmt: skip
    command = [sys.executable, "-c", code, run]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert "writing\n" == process.stdout.readline()
        (run / "capsules" / ".partial-x").symlink_to(run.parent)
        sweep(run.parent)
        process.communicate("\n")

    assert 0 == process.returncode
    assert [1] == [c.step for c in list_capsules(run)]
    assert run.parent.exists()


FULL = (
    WRITE
    + """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
try:
    write(200)
except Exception as error:
    print(type(error).__name__, sorted(os.listdir(run / "capsules")))
"""
)


@pytest.mark.parametrize("size", [0, 100, 300_000])
def test_a_full_disk(run, capsule, size):
    """Where the disk ends in the middle of a capsule, an error tells, and nothing of it stays; the others do."""
    before = contents(capsule)

    out, err = python(FULL, run, size).communicate()

    assert "" == err and out.endswith("['step-000118']\n")
    assert before == contents(capsule)


READ_ONLY = (
    WRITE
    + """
(run / "capsules").chmod(0o555)
if os.geteuid() == 0:
    os.setuid(65534)  # no file mode stops root
try:
    write(200)
except PermissionError as error:
    print(type(error).__name__, sorted(os.listdir(run / "capsules")))
sweep(run.parent)
print(prune(run, Limits(bytes=1)))
"""
)


def test_a_read_only_folder():
    """Where nothing may be written, an error tells; sweeping and making room raise none."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    put(root, 118), put(root, 119)

    out, err = python(READ_ONLY, root).communicate()

    (root / "capsules").chmod(0o755)
    assert 2 == len(list_capsules(root))
    shutil.rmtree(root)
    assert ("", "PermissionError ['step-000118', 'step-000119']\n[]\n") == (err, out)


def test_a_folder_that_is_gone(run, capsule):
    """The folder of a run that somebody removed stays removed."""
    shutil.rmtree(run)

    with pytest.raises(OSError):
        put(run, 200)
    assert not run.exists()


# ---- making room ----------------------------------------------------------------------------------------------------


def steps_left(run):
    return [capsule.step for capsule in list_capsules(run)]


def put_all(run, kinds):
    for step, (channel, observed) in enumerate(kinds):
        os.utime(put(run, step, channel=channel, observed=observed), (1000 + step, 1000 + step))


def test_what_leaves_first(run):
    """The oldest that are neither the run's first nor the first of their kind leave first; the newest stays."""
    put_all(run, [("loss", 2), ("loss", 3), ("grad_norm", 2), ("loss", float("nan")), ("grad_norm", 3), ("loss", 4)])

    orders = []
    for number in (5, 4, 3, 2, 1):
        removed = prune(run, Limits(number=number))
        orders += [int(path.name.removeprefix("step-")) for path in removed]
        assert number == len(steps_left(run))

    # 1 and 4 are repetitions; 2 and 3 the first of their kinds; 0 the first of the run; 5 the newest
    assert [1, 4, 2, 3, 0] == orders
    assert [5] == steps_left(run)


@given(st.lists(st.tuples(st.sampled_from(["loss", "grad_norm", "update"]), st.booleans()), min_size=1, max_size=9),
       st.integers(1, 9))  # fmt: skip
@settings(max_examples=25)
def test_what_is_interesting_stays(tmp_path_factory, kinds, number):
    """Whatever happens in whatever order: the limit holds, the newest is there, and nothing that repeats a reason is
    kept while the first of the reason is not.
    """
    run = tmp_path_factory.mktemp("run", numbered=True)
    kinds = [(channel, float("nan") if bad else 2.0) for channel, bad in kinds]
    put_all(run, kinds)

    prune(run, Limits(number=number))

    left = steps_left(run)
    newest = len(kinds) - 1
    names = [(channel, observed != observed) for channel, observed in kinds]
    assert min(number, len(kinds)) == len(left)
    assert newest in left
    for step in left:
        if step != newest and step != names.index(names[step]):
            assert names.index(names[step]) in left
    shutil.rmtree(run)


def test_the_limit_in_bytes(run):
    """Capsules leave until what is left takes no more bytes than it may; a single one always stays."""
    put_all(run, [("loss", 2)] * 4)
    each = list_capsules(run)[0].bytes

    prune(run, Limits(bytes=2 * each + each // 2))
    assert [0, 3] == steps_left(run)
    prune(run, Limits(bytes=1))
    assert [3] == steps_left(run)


def test_limits_out_of_range():
    """No capsule at all is no limit."""
    with pytest.raises(ValueError, match="at least 1"):
        Limits(number=0)


def test_capsules_that_cannot_be_read_leave_too(run):
    """A damaged capsule counts, and is among the first to leave."""
    put_all(run, [("loss", 2), ("grad_norm", 2), ("update", 2)])
    (run / "capsules" / "step-000001" / "capsule.json").write_text("{", encoding="utf-8")

    assert ["step-000001"] == [path.name for path in prune(run, Limits(number=2))]


# ---- trees ----------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: int
    y: int


@dataclass
class Example:
    image: object
    label: int = 3


def test_trees_come_back():
    """Plain nested data is the same after having been written and read; other numbers than JSON has included."""
    value = {"a": [1, 2.5, None, True, "text"], 3: (1, (2,)), "bad": [float("inf"), -float("inf")], ("k", 1): {}}

    assert value == _tree.decode(json.loads(json.dumps(_tree.encode(value), allow_nan=False)), lambda _: None)
    assert "nan" == _tree.encode("nan")["value"]
    assert np.isnan(_tree.decode(_tree.encode(float("nan")), lambda _: None))


def test_trees_of_classes():
    """Named tuples, dataclasses and mappings come back with their fields, and as themselves if their class is given."""
    value = [Pair(1, 2), Example("i"), OrderedDict(a=1), UserDict(b=2), defaultdict(list, c=3)]
    tree = json.loads(json.dumps(_tree.encode(value)))

    pair, example, *mappings = _tree.decode(tree, lambda _: None)
    assert (1, 2) == pair and 1 == pair.x and 2 == pair.y and {"x": 1, "y": 2} == pair._asdict()
    assert "i" == example.image and 3 == example.label
    assert [{"a": 1}, {"b": 2}, {"c": 3}] == mappings
    known = {_tree.type_name(cls): cls for cls in (Pair, Example, UserDict)}
    pair, example, _, user, _ = _tree.decode(tree, lambda _: None, known.get)
    assert Pair(1, 2) == pair and Pair is type(pair)
    assert Example("i") == example and UserDict(b=2) == user


def test_trees_end():
    """What contains itself, is nested without end or too long, is cut off; what is neither is named by its type."""
    loop = []
    loop.append(loop)
    deep = 1
    for _ in range(500):
        deep = [deep]

    for value in (loop, deep):
        json.dumps(_tree.encode(value))
    assert {"opaque": "builtins.list"} == _tree.encode(list(range(100_000)))
    assert {"opaque": "builtins.complex"} == _tree.encode(1j)
    assert {"opaque": "builtins.int"} == _tree.encode(10**5000)


class Awkward(dict):
    def __len__(self):
        raise RuntimeError

    def items(self):
        raise RuntimeError


def test_trees_of_awkward_things():
    """A class of the user's with manners of its own raises nothing."""
    assert "opaque" in _tree.encode(Awkward(a=1))


@settings(max_examples=300)
@given(JSON)
def test_no_tree_at_all(value):
    """Whatever JSON is given as a tree: data, or TreeError."""
    for tree in (value, {"list": value}, {"dict": value}, {"tuple": value, "names": value}, {"fields": value}):
        try:
            _tree.decode(tree, lambda _: None)
        except _tree.TreeError as error:
            require_sentence(error, end="")
        list(_tree.keys_in(tree))


@settings(max_examples=200)
@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15))  # fmt: skip
def test_all_plain_data_comes_back(value):
    """Encoding and decoding is the identity on what JSON, tuples and mappings hold."""
    back = _tree.decode(json.loads(json.dumps(_tree.encode(value), allow_nan=False)), lambda _: None)

    assert value == back and type(value) is type(back)


def test_modes(capsule):
    """A capsule is no more open to others than the umask says."""
    mask = os.umask(0)
    os.umask(mask)

    assert all(not stat.S_IMODE(file.stat().st_mode) & mask for file in capsule.iterdir())
