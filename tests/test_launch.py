"""A script under `isograd run` behaves as under Python, and what it trains is found without an edit."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

TRAIN = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.01)
for step in range({steps}):
    optimizer.zero_grad()
    loss = (model(torch.randn(16, 4)) - 1).square().mean()
    loss.backward()
    optimizer.step()
print("done", step)
"""


def python(folder: Path, *args: str, **options) -> subprocess.CompletedProcess:
    environment = {**os.environ, **options.pop("env", {})}
    return subprocess.run(
        [sys.executable, *args], cwd=folder, capture_output=True, text=True, timeout=120, env=environment, **options
    )


def isograd(folder: Path, *args: str, **options) -> subprocess.CompletedProcess:
    return python(folder, "-m", "isograd", *args, **options)


def script(folder: Path, text: str, name: str = "train.py") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


def diagnosis(folder: Path) -> dict:
    return json.loads(isograd(folder, "diagnose", "--json").stdout)


PROGRAMS = {
    "an executor that is never shut down": """
        from concurrent.futures import ThreadPoolExecutor
        import time
        pool = ThreadPoolExecutor(2)
        pool.submit(lambda: (time.sleep(0.3), print("late")))
        print("first")
        """,
    "what a script sees of itself": """
        import sys, os
        print(__name__, __file__, sys.argv, sys.path[0], __spec__, __package__, __doc__, __cached__)
        print(sys.modules["__main__"].__dict__ is globals(), type(__loader__).__name__, "isograd" in dir())
        """,
    "standard input": "import sys; print(sys.stdin.read().upper())",
    "exit status 7": "import sys; print('out'); sys.exit(7)",
    "exit with a sentence": "raise SystemExit('no such data')",
    "exit handlers": "import atexit; atexit.register(print, 'last'); print('first')",
    "traceback": "def f():\n    return 1 / 0\n\nf()",
    "chained traceback": "try:\n    {}['x']\nexcept KeyError as e:\n    raise ValueError('y') from e",
    "threads": """
        import threading, time
        threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()
        print('main')
        """,
    "pickling of classes": """
        import pickle
        class Thing: pass
        print(type(pickle.loads(pickle.dumps(Thing()))) is Thing)
        """,
    "spawned processes": """
        import multiprocessing
        def work(x): return x + 1
        if __name__ == "__main__":
            with multiprocessing.get_context("spawn").Pool(2) as pool: print(pool.map(work, [1, 2]))
        """,
    "modules beside it": "import beside; print(beside.x)",
    "environment before torch": """
        import os
        os.environ["OMP_NUM_THREADS"] = "3"
        import torch
        print(torch.get_num_threads())
        """,
    "numpy not imported for it": "import sys; print('numpy' in sys.modules, 'torch' in sys.modules)",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_as_python(name: str, tmp_path: Path) -> None:
    """Standard output, exit status and traceback are those of Python."""
    script(tmp_path, PROGRAMS[name])
    script(tmp_path, "x = 3", "beside.py")

    plain = python(tmp_path, "train.py", "a", "--steps", "-m", input="hello")
    ours = isograd(tmp_path, "run", "train.py", "a", "--steps", "-m", input="hello")

    assert plain.returncode == ours.returncode
    assert plain.stdout == ours.stdout
    said = [line for line in ours.stderr.splitlines() if not line.startswith("isograd:")]
    assert plain.stderr.splitlines() == said


def test_modules(tmp_path: Path) -> None:
    """`-m package.module` runs as under `python -m`, relative imports and all."""
    script(tmp_path, "from . import b\nimport sys\nprint(b.x, __name__, __package__, sys.argv[1:])", "pack/a.py")
    script(tmp_path, "x = 5", "pack/b.py")
    script(tmp_path, "", "pack/__init__.py")

    plain, ours = python(tmp_path, "-m", "pack.a", "-x"), isograd(tmp_path, "run", "-m", "pack.a", "-x")

    assert (plain.stdout, plain.returncode) == (ours.stdout, ours.returncode)


def test_folder_with_a_main(tmp_path: Path) -> None:
    """A folder with a `__main__.py` runs as under Python."""
    script(tmp_path, "import sys; print(__name__, sys.argv)", "app/__main__.py")

    assert python(tmp_path, "app", "1").stdout == isograd(tmp_path, "run", "app", "1").stdout


def test_finds_what_trains(tmp_path: Path) -> None:
    """An unchanged script is watched: model and optimizer found, named after the script's variable, every step seen."""
    script(tmp_path, TRAIN.format(steps=30))

    ours = isograd(tmp_path, "run", "train.py")

    assert ours.returncode == 0 and ours.stdout == "done 29\n"
    found = diagnosis(tmp_path)
    assert (found["subjects"], found["steps"]) == (["model"], 30)


def test_ends_after_steps(tmp_path: Path) -> None:
    """`--steps N` ends the run after exactly N optimizer steps, status 0, `finally` and exit handlers run."""
    script(tmp_path, "import atexit\natexit.register(print, 'bye')\n" + TRAIN.format(steps=1000))

    for steps in (1, 7):
        ours = isograd(tmp_path, "run", "--steps", str(steps), "train.py")
        assert (ours.returncode, ours.stdout) == (0, "bye\n")
        assert diagnosis(tmp_path)["steps"] == steps


def test_exception_keeps_what_was_seen(tmp_path: Path) -> None:
    """A script that fails in its loop is diagnosed up to there, and keeps its traceback and status."""
    script(tmp_path, TRAIN.format(steps=30).replace("    loss.backward()", "    loss.backward()\n    1 / (step - 9)"))

    ours = isograd(tmp_path, "run", "train.py")

    assert ours.returncode == 1 and "ZeroDivisionError" in ours.stderr and "isograd" not in ours.stderr.split("Zero")[0]
    assert diagnosis(tmp_path)["steps"] >= 9


def test_interrupt_keeps_what_was_seen(tmp_path: Path) -> None:
    """Ctrl-C ends the script with status 130; what was seen is kept and diagnosed, and the state says interrupted."""
    script(
        tmp_path,
        TRAIN.format(steps=10**9).replace(
            "    optimizer.step()", "    optimizer.step()\n    if step == 20: print('on', flush=True)"
        ),
    )
    with subprocess.Popen(
        [sys.executable, "-m", "isograd", "run", "train.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=60)

    assert process.returncode == 130
    assert "KeyboardInterrupt" in error
    (run,) = json.loads(isograd(tmp_path, "ls", "--json").stdout)
    assert run["state"] == "interrupted" and run["steps"] > 20
    assert diagnosis(tmp_path)["steps"] > 20


def test_killed_process_leaves_a_readable_run(tmp_path: Path) -> None:
    """After `kill -9` the run is there up to at most 2 s before, and is listed as stopped."""
    script(
        tmp_path,
        TRAIN.format(steps=10**9).replace(
            "    optimizer.step()", "    optimizer.step()\n    if step == 20: print('on', flush=True)"
        ),
    )
    with subprocess.Popen(
        [sys.executable, "-m", "isograd", "run", "train.py"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "on\n"
        time.sleep(2.5)
        process.kill()

    assert diagnosis(tmp_path)["steps"] > 20
    (run,) = json.loads(isograd(tmp_path, "ls", "--json").stdout)
    assert run["state"] == "stopped"


SENTENCES = {
    "missing script": (["run", "nothing.py"], 2, "nothing.py"),
    "missing module": (["run", "-m", "no.such"], 2, "no.such"),
    "folder without main": (["run", "."], 2, "__main__.py"),
    "syntax error": (["run", "broken.py"], 2, "broken.py, line 2"),
    "binary file": (["run", "binary.py"], 2, "binary.py"),
    "not a run": (["diagnose", "broken.py"], 2, "broken.py"),
    "no run yet": (["diagnose"], 2, "isograd run"),
    "unknown name": (["explain", "vanishing-gradient"], 2, "vanishing-gradients"),
    "ill option": (["run", "--steps", "0", "ok.py"], 2, "steps"),
    "trains nothing": (["run", "ok.py"], 0, "o optimizer step was seen"),
    "trains nothing with torch": (["run", "torchless.py"], 0, "o optimizer step was seen"),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_one_sentence(name: str, tmp_path: Path) -> None:
    """A user's mistake gets one sentence on stderr, the right status, and never a traceback."""
    script(tmp_path, "x = 1\ndef (:", "broken.py")
    script(tmp_path, "print(1)", "ok.py")
    script(tmp_path, "import torch; print(1)", "torchless.py")
    (tmp_path / "binary.py").write_bytes(b"\x7fELF\x00\x01\xff")
    args, status, part = SENTENCES[name]

    said = isograd(tmp_path, *args)

    assert said.returncode == status
    assert part in said.stderr and "Traceback" not in said.stderr
    assert len(said.stderr.strip().splitlines()) == 1 and said.stderr.startswith("isograd:")
    assert not list(tmp_path.glob("isograd-runs/*"))


def test_switched_off(tmp_path: Path) -> None:
    """`ISOGRAD=off` runs the script with nothing of isograd in it."""
    script(tmp_path, "import sys; print([m for m in sys.modules if 'isograd' in m])\n" + TRAIN.format(steps=3))

    ours = isograd(tmp_path, "run", "train.py", env={"ISOGRAD": "off"})

    assert (ours.stdout, ours.stderr) == ("[]\ndone 2\n", "")
    assert not (tmp_path / "isograd-runs").exists()


PARALLEL = """
import os, sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from torch import nn

def work(rank, world, *_):
    torch.set_num_threads(1)
    os.environ.update(GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.manual_seed(0)
    net = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for step in range(12):
        optimizer.zero_grad()
        net(torch.randn(8, 4) * (rank + 1)).square().mean().backward()
        optimizer.step()
    dist.destroy_process_group()

if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[1])
        mp.spawn(work, (2,), nprocs=2)
    else:
        work(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    print("end", flush=True)
"""


def free_port() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def test_spawned_ranks(tmp_path: Path) -> None:
    """A script that calls `torch.multiprocessing.spawn` is watched in its processes; rank 0 writes the one run."""
    script(tmp_path, PARALLEL)

    ours = isograd(tmp_path, "run", "train.py", free_port())

    assert ours.returncode == 0 and ours.stdout == "end\n", ours.stderr
    assert len(list((tmp_path / "isograd-runs").iterdir())) == 1
    assert diagnosis(tmp_path)["steps"] == 12


def test_torchrun(tmp_path: Path) -> None:
    """`torchrun … -m isograd run train.py` watches all ranks, and rank 0 writes the one run."""
    script(tmp_path, PARALLEL)

    ours = python(
        tmp_path, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}",
        "-m", "isograd", "run", "train.py", env={"GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip

    # Two processes share the pipe: their line ends may come in any order.
    assert ours.returncode == 0 and ours.stdout.replace("\n", "") == "endend", ours.stderr
    assert len(list((tmp_path / "isograd-runs").iterdir())) == 1
    assert diagnosis(tmp_path)["steps"] == 12
    assert ours.stderr.count("Watch overhead") <= 1


def test_seed(tmp_path: Path) -> None:
    """`--seed` seeds Python, NumPy and torch before the script's own code runs."""
    script(tmp_path, "import random, torch, numpy\nprint(random.random(), numpy.random.rand(), torch.rand(1).item())")

    first, second, other = (isograd(tmp_path, "run", "--seed", seed, "train.py").stdout for seed in ("3", "3", "4"))

    assert first == second != other
