"""The command line: what each command prints, where, and the status that it ends with."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import isograd
from isograd._cli import cli, main
from isograd._history import Layer, Parameter
from isograd._record import RunFile
from isograd._rule import LEVELS

COMMANDS = sorted(cli.commands)


# ---- runs to talk about, written by hand ----------------------------------------------------------------------------


def record(root, *, decades, steps=200, script="train.py"):
    """A run of ten layers whose signal loses `decades` per layer; its loss is flat if it loses any, else it falls."""
    depth = np.arange(9, -1, -1)
    signal = 10.0 ** (-2 - decades * depth)
    run = RunFile.create(root, meta={"script": script, "state": "running", "overhead": 0.004})
    run.add_layers("model", [Layer(name=f"net.{i}", kind="linear", position=i, units=64) for i in range(10)])
    run.add_parameters(
        "model", [Parameter(name=f"net.{i}.weight", layer=f"net.{i}", shape=(64, 64)) for i in range(10)]
    )
    for step in range(steps):
        readings = {
            "loss": 2.3026 if decades else 2.3 * np.exp(-step / 50),
            "loss_nonfinite": 0,
            "global_grad_norm": np.linalg.norm(signal),
            "learning_rate": [0.1],
            "grad_norm": signal,
            "grad_max": signal / 64,
            "grad_nonfinite": np.zeros(10),
        }
        run.write_row("model", step, "cheap", readings)
        run.write_row("model", step, "deep", {"signal_norm": signal, "signal_nonfinite": np.zeros(10)})
    run.set_meta(state="finished", steps=steps)
    run.close()
    return run.path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder, far from any pyproject.toml of others."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def sick(folder):
    return record(folder / "isograd-runs", decades=0.9)


@pytest.fixture
def healthy(folder):
    return record(folder / "isograd-runs", decades=0.0)


def said(capsys, *arguments):
    """(status, stdout, stderr) of a command."""
    status = main(list(map(str, arguments)))
    return status, *capsys.readouterr()


def refused(capsys, *arguments):
    """The sentence on stderr of a command that must end with status 2, print nothing, and show no traceback."""
    status, out, err = said(capsys, *arguments)

    assert (2, "") == (status, out)
    assert err.startswith("isograd: ")
    assert 1 == err.count("\n"), err
    return err


# ---- help and mistakes ----------------------------------------------------------------------------------------------


def test_help_lists_every_command(capsys):
    """`isograd`, `isograd -h` and `isograd --help` list the commands and end well."""
    for arguments in ([], ["-h"], ["--help"]):
        status, out, err = said(capsys, *arguments)

        assert (0, "") == (status, err)
        assert COMMANDS == [line.split()[0] for line in out.partition("Commands:\n")[2].splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys, command):
    """Each command tells its usage with `-h` and ends well."""
    status, out, err = said(capsys, command, "-h")

    assert (0, "") == (status, err)
    assert out.startswith(f"Usage: isograd {command}")


def test_version(capsys):
    """`--version` names the version of the package."""
    assert (0, f"isograd {isograd.__version__}\n", "") == said(capsys, "--version")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["diagnos"], "No such command 'diagnos'"),
        (["diagnose", "--jsn"], "No such option '--jsn'"),
        (["explain"], "Missing argument 'NAME'"),
        (["run"], "Missing argument 'SCRIPT'"),
        (["run", "--stps", "3", "x.py"], "No such option '--stps'"),
        (["run", "--steps", "x", "x.py"], "'x' is not a valid integer"),
        (
            ["run", "--steps", "0", "x.py"],
            "steps in the arguments is 0, but must be a whole number of steps, 1 or more.",
        ),
        (
            ["run", "--budget", "-1", "x.py"],
            "budget in the arguments is -1.0, but must be a share of wall time above 0",
        ),
        (["run", "--fail-on", "bad", "x.py"], "'bad' is not one of 'info', 'warning', 'error'"),
        (["run", "x.py"], "There is no script x.py"),
        (["run", "-m", "no_such_module_here"], "There is no module named no_such_module_here"),
        (["explain", "dead-unit"], "'dead-unit' is no symptom, cause, remedy or statistic; did you mean dead-units"),
        (["diagnose"], "no run has been recorded in isograd-runs"),
        (["diagnose", "nothing-here"], "no run in isograd-runs is called 'nothing-here'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_sentence(folder, capsys, arguments, sentence):
    """A mistake on the command line is one sentence on stderr, status 2, and no traceback."""
    assert sentence in refused(capsys, *arguments)


def test_a_syntax_error_is_one_sentence(folder, capsys):
    """A script that does not compile is told with its line, before anything runs."""
    (folder / "broken.py").write_text("x = 1\nprint('a'\n")

    assert "broken.py, line 2: syntax error" in refused(capsys, "run", "broken.py")


@pytest.mark.parametrize("content", [b"", b"not a database", b"SQLite format 3\x00" + bytes(50)])
def test_a_file_that_is_no_run_is_one_sentence(folder, capsys, content):
    """A path to something else than a run is refused."""
    (folder / "run.db").write_bytes(content)

    assert "run.db" in refused(capsys, "diagnose", "run.db")


def test_a_folder_that_is_no_run_is_one_sentence(folder, capsys):
    """A folder without a run in it is refused."""
    (folder / "empty").mkdir()

    assert "empty" in refused(capsys, "diagnose", "./empty")


def test_an_ill_setting_is_one_sentence(folder, capsys):
    """A mistake in pyproject.toml is told by file and key, whatever the command."""
    (folder / "pyproject.toml").write_text("[tool.isograd]\nevry = 5\n")

    for arguments in (["ls"], ["diagnose"], ["run", "x.py"]):
        assert "evry in" in refused(capsys, *arguments)


def test_a_run_without_a_step_cannot_be_diagnosed(folder, capsys):
    """A run in which no optimizer step was seen is not called healthy."""
    path = record(folder / "isograd-runs", decades=0.0, steps=0)

    assert f"{path.name} holds no optimizer step" in refused(capsys, "diagnose")


# ---- diagnose, ls, explain ------------------------------------------------------------------------------------------


def test_diagnose_a_sick_run(sick, capsys):
    """A run with a cause at warning or above ends with status 1 and is told on stdout, with its depth profile."""
    status, out, err = said(capsys, "diagnose")

    assert (1, "") == (status, err)
    assert out.startswith("isograd: not healthy")
    assert "vanishing-gradients" in out
    assert "From layer net.9 back to net.0 it falls by 8.1 decades" in out


def test_diagnose_a_healthy_run(healthy, capsys):
    """A run without such a cause ends with status 0."""
    status, out, err = said(capsys, "diagnose")

    assert (0, "") == (status, err)
    assert out.startswith("isograd: healthy.")


def test_the_latest_run_is_the_default(folder, capsys):
    """Without a name the run that started last is diagnosed; with an id, its unique beginning, or a path, that one."""
    runs = folder / "isograd-runs"
    first, second = record(runs, decades=0.9, script="a.py"), record(runs, decades=0.0, script="b.py")
    for path, started in ((first, "2030-01-01T00:00:00Z"), (second, "2030-01-02T00:00:00Z")):
        _set_started(path, started)

    assert 0 == said(capsys, "diagnose")[0]
    for name in (first.name, first.name[:-1], first, first / "run.db"):
        assert 1 == said(capsys, "diagnose", name)[0]


def _set_started(path, started):
    import sqlite3

    with sqlite3.connect(path / "run.db") as connection:
        connection.execute("UPDATE meta SET value = ? WHERE key = 'started'", (json.dumps(started),))
    connection.close()


def test_json_is_the_diagnosis(sick, capsys):
    """`diagnose --json` prints the diagnosis of schema 1 and nothing else, with the same status."""
    status, out, err = said(capsys, "diagnose", "--json")
    told = json.loads(out)

    assert (1, "") == (status, err)
    assert json.loads(json.dumps(isograd.diagnose(sick).to_dict())) == told
    assert (1, sick.name, ["model"], 200, False) == tuple(
        told[key] for key in ("schema", "run", "subjects", "steps", "healthy")
    )
    keys = "cause subject level layers first_step confidence message symptoms evidence remedies"
    assert set(keys.split()) <= set(told["causes"][0])


def test_options_of_rules_reach_the_diagnosis(sick, folder, capsys):
    """An option in pyproject.toml changes what is found in a run recorded before."""
    before = json.loads(said(capsys, "diagnose", "--json")[1])
    (folder / "pyproject.toml").write_text("[tool.isograd.rules.vanishing-gradients]\ndecades = 50\nhopeless = 60\n")
    after = json.loads(said(capsys, "diagnose", "--json")[1])

    seen = [{name for c in told["causes"] for name in (c["cause"], *c["symptoms"])} for told in (before, after)]
    assert ["vanishing-gradients" in names for names in seen] == [True, False]


def test_verbose_says_more(sick, capsys):
    """`-v` tells what the short verdict leaves out, and is what the short one points to."""
    short, long = said(capsys, "diagnose")[1], said(capsys, "diagnose", "-v")[1]

    assert f"All of it: isograd diagnose {sick.name} -v" in short
    assert "Not measured:" in long
    assert "Not measured:" not in short


def test_ls_without_a_run(folder, capsys):
    """Where nothing was recorded, `ls` says how to, and `ls --json` gives an empty list."""
    assert "isograd run SCRIPT" in said(capsys, "ls")[1]
    assert (0, "[]\n", "") == said(capsys, "ls", "--json")


def test_ls_lists_runs(sick, healthy, capsys):
    """`ls` has a line per run with its state, steps and script, and `--json` the same as data."""
    out = said(capsys, "ls")[1]
    told = json.loads(said(capsys, "ls", "--json")[1])

    assert 3 == len(out.splitlines())
    assert (
        {sick.name, healthy.name} == {run["id"] for run in told} == {line.split()[0] for line in out.splitlines()[1:]}
    )
    assert {("finished", 200, "train.py")} == {(run["state"], run["steps"], run["script"]) for run in told}


def test_explain(capsys):
    """`explain` prints the page of a rule or a statistic on stdout."""
    for name in ("vanishing-gradients", "signal_norm"):
        status, out, err = said(capsys, "explain", name)

        assert (0, "") == (status, err)
        assert out.startswith(name)


# ---- processes ------------------------------------------------------------------------------------------------------


def isograd_process(*arguments, folder, **more):
    command = [sys.executable, "-m", "isograd", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=120, **more)


def script(folder, text, name="script.py"):
    (folder / name).write_text(textwrap.dedent(text))
    return name


TRAIN = """
    import sys, torch
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(32, 4)
    y = x @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]])
    for step in range(60):
        loss = ((model(x) - y) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, loss.item())
    print(sys.argv, __name__)
"""


def test_run_leaves_output_and_status_alone(folder):
    """Under `isograd run` stdout is what Python gives, the status is the script's, and the verdict is on stderr."""
    name = script(folder, TRAIN + "    sys.exit(7)\n")
    arguments = [name, "--steps", "5", "-m", "--", "--help", "a b"]
    plain = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=folder, timeout=120)

    watched = isograd_process("run", *arguments, folder=folder)

    assert (7, plain.stdout) == (watched.returncode, watched.stdout)
    assert watched.stderr.startswith("isograd: ")
    assert "60 steps of model" in watched.stderr
    assert "\x1b" not in watched.stderr


def test_run_a_module_for_some_steps(folder):
    """`-m MODULE ARGS` runs a module, and `--steps N` ends it cleanly after N optimizer steps."""
    package = folder / "package"
    package.mkdir()
    script(package, TRAIN, "train.py")

    done = isograd_process("run", "--steps", 10, "--seed", 1, "-m", "package.train", "--lr", "3", folder=folder)

    assert 0 == done.returncode
    # The run ends inside the tenth step, before what the script prints behind it.
    assert [str(step) for step in range(9)] == [line.split()[0] for line in done.stdout.splitlines()]
    assert "10 steps of model" in done.stderr


def test_fail_on(folder):
    """`--fail-on LEVEL` turns a cause at that level into status 3, and leaves a healthy run's status alone."""
    diverging = script(folder, TRAIN.replace("lr=0.1", "lr=10.0"), "diverging.py")
    converging = script(folder, TRAIN, "converging.py")

    statuses = [
        isograd_process("run", "--fail-on", "warning", name, folder=folder).returncode
        for name in (diverging, converging)
    ]

    assert [3, 0] == statuses


def test_a_script_that_does_not_train(folder):
    """A script without an optimizer step keeps its output and status, and one sentence says that nothing was seen."""
    done = isograd_process("run", script(folder, "print('hello')\nraise SystemExit(5)\n"), folder=folder)

    assert (5, "hello\n") == (done.returncode, done.stdout)
    assert done.stderr.startswith("isograd: No optimizer step was seen")
    assert 1 == done.stderr.count("\n")
    assert not list((folder / "isograd-runs").glob("*"))


def test_a_script_finds_its_process_untouched(folder):
    """Before a script's first line, `isograd run` has imported neither NumPy nor torch nor the terminal library."""
    name = script(folder, "import sys\nprint([m for m in ('numpy', 'torch', 'rich') if m in sys.modules])\n")

    assert "[]\n" == isograd_process("run", name, folder=folder).stdout


def test_modules_of_the_script_do_not_stand_in_for_ours(folder):
    """A file beside the script that is named like one of isograd's dependencies does not break the verdict."""
    script(folder, "raise ImportError('not the real one')\n", "rich.py")

    done = isograd_process("run", script(folder, TRAIN), folder=folder)

    assert 0 == done.returncode
    assert "60 steps of model" in done.stderr


@pytest.mark.parametrize("words", [["run"], ["run", "-m"]])
def test_off_runs_plain_python(folder, words):
    """With ISOGRAD=off the script runs in a process that has no isograd in it, and nothing is written."""
    name = script(folder, "import sys\nprint(sorted(m for m in sys.modules if 'isograd' in m), sys.argv[1:])\n")
    target = name.removesuffix(".py") if "-m" in words else name

    done = isograd_process(*words, target, "-x", folder=folder, env={**os.environ, "ISOGRAD": "off"})

    assert (0, "[] ['-x']\n", "") == (done.returncode, done.stdout, done.stderr)
    assert [folder / name] == [path for path in folder.iterdir() if path.name != "__pycache__"]


def test_help_is_light(folder):
    """`isograd --help` imports neither NumPy nor the terminal library."""
    code = "import sys; from isograd._cli import main; main(['-h']); print({'numpy', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert "set()" == done.stdout.splitlines()[-1]


def test_a_closed_pipe_is_no_error(folder):
    """A reader that goes away early, as `head -1`, gets its line, and nobody gets a traceback."""
    command = f"{sys.executable} -m isograd explain vanishing-gradients | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=folder, timeout=60)

    assert "" == done.stderr
    assert done.stdout.startswith("vanishing-gradients")
    assert done.stdout.endswith("0\n")


def test_a_pipe_closed_before_writing_is_no_error(folder):
    """The same where the reader is gone before the first byte: the first write fails, whatever the buffers hold."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as nobody:
        command = [sys.executable, "-m", "isograd", "explain", "vanishing-gradients"]
        done = subprocess.run(command, stdout=nobody, stderr=subprocess.PIPE, timeout=60)

    assert (0, b"") == (done.returncode, done.stderr)


def test_ctrl_c(folder):
    """Ctrl-C ends the script as Python does, what was seen until then is diagnosed, and the status is 130."""
    name = script(
        folder,
        TRAIN.replace("range(60)", "range(10**9)").replace("print(step, loss.item())", "print(step, flush=True)"),
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "isograd", "run", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    while int(process.stdout.readline()) < 30:
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)

    assert 130 == process.returncode
    assert "KeyboardInterrupt" in err
    assert "The run was interrupted at step" in err


def test_an_exception_in_the_script_is_the_scripts(folder):
    """An uncaught exception gives Python's own traceback, status 1, and a verdict on what was seen before."""
    name = script(folder, TRAIN.replace("print(step, loss.item())", "assert step < 40, 'enough'"))
    plain = subprocess.run([sys.executable, name], capture_output=True, text=True, cwd=folder, timeout=120)

    done = isograd_process("run", name, folder=folder)

    assert 1 == done.returncode
    assert plain.stderr.splitlines()[-1] in done.stderr
    assert "The script raised AssertionError at step 40." in done.stderr


@pytest.mark.parametrize(
    "end", ["sys.stderr.close()", "sys.stderr = None; sys.stdout = open(os.devnull, 'w'); os.chdir('/')"]
)
def test_whatever_a_script_leaves_behind(folder, end):
    """A script that closes or replaces its streams, or leaves its folder, keeps its status."""
    done = isograd_process("run", script(folder, TRAIN + f"    import os\n    {end}\n"), folder=folder)

    assert 0 == done.returncode
    assert "Traceback" not in done.stderr


def on_a_terminal(folder, *arguments):
    """Everything that a terminal of 80 columns shows of a command whose stdout and stderr it is."""
    primary, secondary = pty.openpty()
    environment = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(
        [sys.executable, "-m", "isograd", *arguments], stdout=secondary, stderr=secondary, cwd=folder, env=environment
    ):
        os.close(secondary)
        received = b""
        while select.select([primary], [], [], 60)[0]:
            try:
                part = os.read(primary, 65536)
            except OSError:  # the other side is closed
                break
            if not part:
                break
            received += part
    os.close(primary)
    return received.decode()


def test_a_terminal_sees_progress_and_colors(folder):
    """On a terminal a run shows its progress, erases it, and ends with a verdict in color."""
    slow = TRAIN.replace("print(step, loss.item())", "import time; time.sleep(0.02)")
    shown = on_a_terminal(folder, "run", script(folder, slow))

    assert "\x1b[2Kisograd  step " in shown
    assert "isograd: \x1b[1;3" in shown
    assert shown.rindex("\x1b[2K") < shown.index("isograd: \x1b[1;3")


def test_levels_of_the_command_line_are_those_of_the_rules():
    """`--fail-on` offers exactly the levels that a finding can have."""
    option = next(o for o in cli.commands["run"].params if o.name == "fail_on")

    assert list(LEVELS) == list(option.type.choices)


# ---- treat ----------------------------------------------------------------------------------------------------------


def test_treat_proposes_what_apply_takes(capsys, sick):
    """A sick run gets proposals in order, each with the code to paste; JSON says the same, with the score."""
    status, out, err = said(capsys, "treat", sick)
    _, as_json, _ = said(capsys, "treat", "--json", sick)

    told = json.loads(as_json)["treatments"]
    assert (1, "") == (status, err)
    assert [line.split()[1] for line in out.splitlines() if line[:1].isdigit()] == [t["treatment"] for t in told]
    assert all(t["code"] for t in told)
    assert [t["score"] for t in told] == sorted((t["score"] for t in told), reverse=True)


def test_treat_leaves_a_healthy_run_alone(capsys, healthy):
    """A healthy run has nothing to treat."""
    assert (0, "Nothing to treat: no fault was found in 200 steps.\n", "") == said(capsys, "treat", healthy)


def test_a_remedy_has_a_page(capsys):
    """`explain` tells a remedy's risks, the causes that it treats, and its options as --apply takes them."""
    status, out, _ = said(capsys, "explain", "clip-gradient-norm")

    assert 0 == status
    assert "Risks" in out
    assert "Treats: recurrent-explosion" in out
    assert "as in --apply clip-gradient-norm:option=value\n  max_norm = 1.0" in out
