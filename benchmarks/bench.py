"""Measures what watching costs and writes RESULTS.md and results.json beside this file.

python benchmarks/bench.py                   # everything, about a quarter of an hour on two cores
python benchmarks/bench.py --only gpt,import # some sections; the others keep their last figures
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import variants
import workloads
from paired import Floats, bootstrap, interleave, median_difference, median_ratio, total_ratio

import isograd

HERE = Path(__file__).parent
PACKAGES = ("isograd", "torch", "numpy", "keras", "tensorflow_cpu", "jax", "wandb", "tensorboard", "lightning")
BASE = "unwatched"

# A second unwatched copy shows what the method itself resolves: its ratio is 1 but for noise.
OURS = {
    BASE: variants.unwatched,
    "unwatched again": variants.unwatched,
    "isograd, default": variants.isograd_default,
}
THEIRS = {
    "wandb.watch(log='all', log_freq=1)": variants.wandb_watch,
    "TensorBoard histograms": variants.tensorboard_histograms,
    "Lightning grad_norm": variants.lightning_grad_norm,
}
EVERYTHING = {"isograd, every statistic at every step": variants.isograd_everything}

GUARDS = {
    "watched again": variants.isograd_default,
    "guard: skip and clip, no capsules": variants.guard_without_ring,
    "guard: skip and clip": variants.guard,
    "guard: skip, clip and rewind": variants.guard_rewind,
}

# The first 20 steps are all read in full, within an allowance of 2 s; what a long run pays begins behind them.
EARLY = 24
WARM_UP = {"isograd, default": EARLY}


def compare(times: dict[str, Floats], base: str = BASE) -> list[dict[str, Any]]:
    """One row per variant: seconds of a step, and both ratios to the run that is the base."""
    return [
        {
            "variant": name,
            "rounds": int(np.isfinite(seconds).sum()),
            "seconds": float(np.nanmedian(seconds)),
            "median_ratio": asdict(bootstrap(median_ratio, seconds, times[base])),
            "total_ratio": asdict(bootstrap(total_ratio, seconds, times[base])),
        }
        for name, seconds in times.items()
        if name != base
    ]


def measure_gpt(folder: Path, scale: float) -> list[dict[str, Any]]:
    """The 13.8 M-parameter GPT: unwatched, both ways of isograd, and three other tools."""
    return compare(
        interleave(
            workloads.gpt,
            OURS | EVERYTHING | THEIRS,
            folder=folder,
            seconds=280 * scale,
            warm_up=WARM_UP,
            rare={"wandb.watch(log='all', log_freq=1)": 4, "TensorBoard histograms": 4},
        )
    )


def measure_guard(folder: Path, scale: float) -> list[dict[str, Any]]:
    """The same GPT, guarded, against the run that is only watched."""
    watched = {"isograd, default": variants.isograd_default}
    contestants = watched | GUARDS
    # Ranges are known after 40 steps: from then on every limit is looked at.
    warm_up = dict.fromkeys(contestants, 48)
    times = interleave(workloads.gpt, contestants, folder=folder, seconds=280 * scale, warm_up=warm_up)
    return compare(times, base="isograd, default")


def measure_serve(folder: Path, scale: float) -> list[dict[str, Any]]:
    """The same GPT with its live page open, against the run that is only watched."""
    watched = {"isograd, default": variants.isograd_default}
    contestants = watched | {"watched again": variants.isograd_default, "live page open": variants.isograd_served}
    warm_up = dict.fromkeys(contestants, EARLY)
    how = {"block": variants.BLOCK, "seconds": 280 * scale, "warm_up": warm_up}
    return compare(interleave(workloads.gpt, contestants, folder=folder, **how), base="isograd, default")


def measure_cnn(folder: Path, scale: float) -> list[dict[str, Any]]:
    """ResNet-18."""
    return compare(interleave(workloads.cnn, OURS, folder=folder, seconds=70 * scale, warm_up=WARM_UP))


def measure_lstm(folder: Path, scale: float) -> list[dict[str, Any]]:
    """The LSTM language model."""
    return compare(interleave(workloads.lstm, OURS, folder=folder, seconds=70 * scale, warm_up=WARM_UP))


def measure_keras(_folder: Path, scale: float) -> list[dict[str, Any]]:
    """`fit` of a CNN in Keras on its three backends, each in a process of its own."""
    rows = []
    for backend in ("tensorflow", "jax", "torch"):
        command = [sys.executable, str(HERE / "keras_fit.py"), "--seconds", str(120 * scale)]
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        times = {name: np.array(seconds) for name, seconds in found.pop("times").items()}
        rows.append({**found, "rows": compare(times)})
    return rows


def measure_tensors(folder: Path, scale: float) -> list[dict[str, Any]]:
    """Seconds that a step becomes longer, for 10 to 10,000 tensors of 64 entries."""
    rows = []
    for num in (10, 100, 1000, 10_000):
        times = interleave(
            functools.partial(workloads.loose_tensors, num),
            {BASE: variants.unwatched, "default": variants.isograd_default, "everything": variants.isograd_everything},
            folder=folder / str(num),
            seconds=15 * scale,
            block=5 if num < 10_000 else 1,
            # Behind step 500 the default's deep steps are 100 steps apart, and a median is a step of the cheap tier.
            warm_up={"default": 500 if num < 10_000 else 60},
        )
        added = {name: asdict(bootstrap(median_difference, times[name], times[BASE])) for name in times if name != BASE}
        rows.append({"tensors": num, "step_seconds": float(np.median(times[BASE])), **added})
    return rows


def measure_size(folder: Path, scale: float) -> list[dict[str, Any]]:
    """Bytes of the run folder per 1,000 steps of a model with the modules and tensors of the GPT, each narrow."""
    # Bytes do not depend on threads, and tensors this small only make threads wait for each other.
    torch.set_num_threads(1)
    rows = []
    steps = max(20, round(1000 * scale))
    for name, variant in (("default", variants.isograd_default), ("everything", variants.isograd_everything)):
        program = workloads.gpt(width=12, batch=2, context=8)
        with variant(program, folder / name) as calls:
            for index in range(steps):
                program.step(index, calls)
        size = sum(path.stat().st_size for path in (folder / name).rglob("*") if path.is_file())
        parameters = sum(1 for _ in program.model.parameters())
        rows.append(
            {"variant": name, "steps": steps, "tensors": parameters, "bytes_per_1000_steps": size * 1000 / steps}
        )
    return rows


def measure_import(_folder: Path, _scale: float) -> dict[str, float]:
    """Seconds of imports in a fresh interpreter, the interpreter's own start excluded: best of ten."""
    statements = {
        "isograd": "import isograd",
        "everything": "from isograd import *",
        "numpy": "import numpy",
    }
    script = "import time; start = time.perf_counter(); {0}; print(time.perf_counter() - start)"
    return {
        name: min(float(_python("-c", script.format(statement))) for _ in range(10))
        for name, statement in statements.items()
    }


def measure_preflight(_folder: Path, scale: float) -> list[dict[str, Any]]:
    """A preflight in training steps of the same program, without and with the sharpness."""
    programs = {"gpt": workloads.gpt(), "cnn": workloads.cnn(), "lstm": workloads.lstm()}
    return [
        {"program": name, **in_steps(program, rounds=max(1, round(5 * scale)))} for name, program in programs.items()
    ]


def in_steps(program: workloads.Program, *, rounds: int) -> dict[str, float]:
    """Seconds of a step, and a preflight's time in steps: medians over rounds of both, the sharpness once."""

    def preflight(*, sharpness: bool = False) -> None:
        isograd.preflight(program.model, program.loss_fn, program.batch, program.optimizer, sharpness=sharpness)

    def step() -> None:
        program.step(0, workloads.Calls())

    preflight()  # what is imported once
    step()
    pairs = np.array([[_timed(step), _timed(step), _timed(preflight)] for _ in range(rounds)])
    seconds = float(np.median(pairs[:, :2]))
    bent = _timed(lambda: preflight(sharpness=True))
    return {"step_seconds": seconds, "steps": float(np.median(pairs[:, 2])) / seconds, "all_steps": bent / seconds}


def measure_diagnose(folder: Path, scale: float) -> dict[str, float]:
    """Seconds of `isograd diagnose` as a command on a long run of a wide model: best of three."""
    steps = max(200, round(10_000 * scale))
    path = write_run(folder, steps=steps, layers=300)
    size = sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    seconds = min(_timed(lambda: _python("-m", "isograd", "diagnose", str(path), "--json")) for _ in range(3))
    return {"steps": steps, "layers": 300, "bytes": size, "seconds": seconds}


def write_run(root: Path, *, steps: int, layers: int, kept: int = 10_000, every: int | None = None) -> Path:
    """A recorded run of a healthy network: two tensors a layer, the cheap tier always, the deep one at 500 steps or
    at every so many.
    """
    from isograd._history import Layer, Parameter
    from isograd._record import RunFile
    from isograd._statistics import STATISTICS

    names = [f"layers.{index}" for index in range(layers)]
    file = RunFile.create(root, meta={"script": "train.py", "state": "running", "steps": 0}, kept=kept)
    file.add_layers("model", [Layer(name=n, kind="linear", type="Linear", position=i) for i, n in enumerate(names)])
    parts = [Parameter(name=f"{n}.{part}", layer=n, shape=(64, 64)) for n in names for part in ("weight", "bias")]
    file.add_parameters("model", parts)
    file.set_groups("model", [{"optimizer": "AdamW", "lr": 1e-3}])
    draw = np.random.default_rng(0)
    width = {"step": 1, "group": 1, "parameter": len(parts), "layer": layers}
    typical = {"learning_rate": 1e-3, "clip_factor": 1.0, "micro_batches": 1.0, "loss_scale": 1.0, "calls": 1.0}
    for step in range(steps):
        for tier in ("cheap", "deep") if step % (every or max(1, steps // 500)) == 0 else ("cheap",):
            row = {
                s.name: _reading(s.name, width[s.axis], typical, step, draw)
                for s in STATISTICS.values()
                if s.tier == tier and s.axis in width
            }
            file.write_row("model", step, tier, row)
    file.set_meta(state="finished", steps=steps)
    file.close()
    return file.path


def measure_report(folder: Path, scale: float) -> dict[str, float]:
    """Seconds of `isograd report` as a command on a very long run of a very wide model, best of three; its page."""
    steps, layers = max(20_000, round(1_000_000 * scale)), 1000
    path = write_long_run(folder, steps=steps, layers=layers)
    size = sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    page = folder / "report.html"
    command = ("-m", "isograd", "report", str(path), "-o", str(page))
    seconds = min(_timed(lambda: _python(*command)) for _ in range(3))
    from isograd._page import asset

    own = page.stat().st_size - len(asset("plotly.min.js"))
    return {"steps": steps, "layers": layers, "bytes": size, "seconds": seconds, "page_bytes": own}


_EVERY = 100  # steps between two deep ones in a long run
_LARGEST = 900_000_000  # bytes to which the recorder rolls a run up


def write_long_run(root: Path, *, steps: int, layers: int) -> Path:
    """A run file of so many steps as the recorder leaves it, in seconds instead of hours.

    Rows of every tier and level are recorded, and merged, for real; then each stands for as many as a run of this
    length would have. How many those are follows the recorder's rule: of each level all but the last 10,000 rows are
    merged ten to one, and earlier where the file is too large.
    """
    from isograd._layout import MERGED

    pattern = 24 * 25 + 24
    path = write_run(root, steps=pattern, layers=layers, kept=24, every=1)
    with contextlib.closing(sqlite3.connect(path / "run.db")) as database:
        streams = {tier: stream for stream, tier in database.execute("SELECT stream, tier FROM streams")}
        query = "SELECT layout, readings FROM rows WHERE stream = ? AND level = ? ORDER BY step"
        packed = {
            (tier, level): database.execute(query, (stream, level)).fetchall()
            for tier, stream in streams.items()
            for level in (0, 1)
        }
        sizes = {where: len(rows[0][1]) for where, rows in packed.items()}
        database.execute("DELETE FROM rows")
        for (tier, level), (first, count) in _levels(steps, sizes).items():
            unit = 1 if tier == "cheap" else _EVERY
            span = unit * MERGED**level
            rows = packed[tier, min(level, 1)]
            database.executemany(
                "INSERT INTO rows VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (streams[tier], level, first + i * span, first + (i + 1) * span - unit, *rows[i % len(rows)])
                    for i in range(count)
                ),
            )
        database.execute("UPDATE meta SET value = ? WHERE key = 'steps'", (str(steps),))
        database.commit()
        database.execute("VACUUM")
    return path


def _levels(steps: int, sizes: dict[tuple[str, int], int]) -> dict[tuple[str, int], tuple[int, int]]:
    """(tier, level) -> (its first step, its rows), oldest first, of a run that the recorder has rolled up."""
    counts = {("cheap", 0): 0, ("deep", 0): 0}

    def bytes_of(where: tuple[str, int]) -> int:
        return counts[where] * sizes[where[0], min(where[1], 1)]

    for _ in range(steps // 1000):
        counts["cheap", 0] += 1000
        counts["deep", 0] += 1000 // _EVERY
        while True:
            full = [where for where, count in counts.items() if count >= 10_200]
            if not full and sum(map(bytes_of, counts)) > _LARGEST:
                full = sorted((w for w, count in counts.items() if count >= 400), key=bytes_of)[-1:]
            if not full:
                break
            tier, level = full[0]
            counts[tier, level] -= 200
            counts[tier, level + 1] = counts.get((tier, level + 1), 0) + 20
    levels = {}
    for tier, unit in (("cheap", 1), ("deep", _EVERY)):
        first = 0
        for where in sorted((w for w in counts if w[0] == tier), reverse=True):
            levels[where] = first, counts[where]
            first += counts[where] * unit * 10 ** where[1]
    return levels


def _reading(name: str, width: int, typical: dict[str, float], step: int, draw: np.random.Generator) -> Floats:
    if name == "loss":
        return np.array(2.3 * np.exp(-step / 3000) + 0.05 * draw.random())
    if name.endswith(("nonfinite", "fraction")) or name in {"skipped", "saturation", "replica_difference"}:
        return np.zeros(width)
    if name == "update_ratio":
        return 1e-3 * draw.lognormal(0, 0.3, width)
    return typical.get(name, 1.0) * (np.ones(width) if name in typical else draw.lognormal(0, 0.3, width))


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode not in (0, 1):
        raise RuntimeError(f"{' '.join(arguments)} ended with status {done.returncode}: {done.stderr}")
    return done.stdout


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


SECTIONS: dict[str, Callable[[Path, float], Any]] = {
    "gpt": measure_gpt,
    "cnn": measure_cnn,
    "lstm": measure_lstm,
    "guard": measure_guard,
    "serve": measure_serve,
    "keras": measure_keras,
    "tensors": measure_tensors,
    "size": measure_size,
    "preflight": measure_preflight,
    "import": measure_import,
    "diagnose": measure_diagnose,
    "report": measure_report,
}


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "load before": round(os.getloadavg()[0], 2),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


# ---- RESULTS.md ---------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: first column to the left, numbers to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def ratio(interval: dict[str, float]) -> str:
    """A ratio with its interval."""
    return f"{interval['value']:.3f} [{interval['low']:.3f}, {interval['high']:.3f}]"


def ratios(rows: list[dict[str, Any]]) -> str:
    """The table of one program."""
    head = ["", "ms a step", "usual step (median of paired ratios)", "all steps (ratio of totals)", "rounds"]
    body = [
        [
            row["variant"],
            f"{1000 * row['seconds']:.1f}",
            ratio(row["median_ratio"]),
            ratio(row["total_ratio"]),
            str(row["rounds"]),
        ]
        for row in rows
    ]
    return table(head, body)


def tensors(rows: list[dict[str, Any]]) -> str:
    """The table of cost against the number of tensors, in microseconds."""
    head = ["tensors", "unwatched step, us", "default adds, us", "every statistic adds, us"]

    def cell(interval: dict[str, float]) -> str:
        return f"{1e6 * interval['value']:,.0f} [{1e6 * interval['low']:,.0f}, {1e6 * interval['high']:,.0f}]"

    body = [
        [f"{row['tensors']:,}", f"{1e6 * row['step_seconds']:,.0f}", cell(row["default"]), cell(row["everything"])]
        for row in rows
    ]
    return table(head, body)


def sizes(rows: list[dict[str, Any]]) -> str:
    """The table of run file sizes."""
    body = [[row["variant"], str(row["tensors"]), f"{row['bytes_per_1000_steps'] / 1e6:.2f}"] for row in rows]
    return table(["", "tensors", "MB per 1,000 steps"], body)


def keras_title(found: dict[str, Any]) -> str:
    """Which program was timed on which backend."""
    size = f"{found['parameters'] / 1e6:.1f} M parameters"
    return f"Keras {found['keras']} on {found['backend']}: CNN, {size}, batch 64, Adam"


def keras_words(found: dict[str, Any]) -> str:
    """What compiling costs once."""
    seconds = found["compile_seconds"]
    return (
        f"`fit`, in epochs of 4 batches. The first epoch takes {seconds['unwatched']:.1f} s longer than the later ones "
        f"unwatched and {seconds['isograd, default']:.1f} s watched, where both steps are compiled."
    )


def preflights(rows: list[dict[str, Any]]) -> str:
    """The table of what a preflight costs."""
    head = ["", "ms a step", "preflight, in steps", "with the sharpness, in steps"]
    body = [
        [row["program"], f"{1000 * row['step_seconds']:.1f}", f"{row['steps']:.1f}", f"{row['all_steps']:.0f}"]
        for row in rows
    ]
    return table(head, body)


METHOD = f"""Written by `make bench`. Ratios are to the same program, unwatched, in the same process and the same round
of steps (order drawn anew in every round), with bootstrap intervals of 95 % over rounds. *Usual step* is the median
over rounds; *all steps* counts rare expensive steps in full. *Unwatched again* is a second unwatched copy: what the
method resolves. isograd's deep tier, and thus the ratio of totals, is densest at the beginning of a run, which is what
is timed here (from step {EARLY})."""


def report(figures: dict[str, Any]) -> str:
    """RESULTS.md."""
    parts = [
        "# What watching costs",
        METHOD,
    ]
    titles = {
        "gpt": "GPT, 13.8 M parameters (d 384, 6 layers, vocabulary 4096, 8 x 128 tokens, fused AdamW)",
        "cnn": "CNN: ResNet-18, 11.2 M parameters, 16 images of 32 x 32, SGD with momentum",
        "lstm": "LSTM language model, 6.8 M parameters, 16 x 64 tokens, Adam",
    }
    parts += [f"## {title}\n\n{ratios(figures[name])}" for name, title in titles.items() if name in figures]
    if "keras" in figures:
        parts += [
            f"## {keras_title(found)}\n\n{keras_words(found)}\n\n{ratios(found['rows'])}" for found in figures["keras"]
        ]
    if "guard" in figures:
        parts.append(f"## Guard, on the GPT above\n\nHere ratios are to the watched run.\n\n{ratios(figures['guard'])}")
    if "serve" in figures:
        words = (
            f"Ratios are to the watched run, in blocks of {variants.BLOCK} steps; the server is stopped in the others'."
        )
        parts.append(f"## Live page, on the GPT above\n\n{words}\n\n{ratios(figures['serve'])}")
    if "tensors" in figures:
        parts.append(f"## Cost of a step against the number of tensors\n\n{tensors(figures['tensors'])}")
    if "size" in figures:
        parts.append(f"## Run file\n\nModules and tensors of the GPT above.\n\n{sizes(figures['size'])}")
    if "preflight" in figures:
        parts.append(f"## Preflight\n\nOf the programs above, once.\n\n{preflights(figures['preflight'])}")
    if "import" in figures:
        seconds = figures["import"]
        parts.append(
            f"## Import\n\n`import isograd`: {seconds['isograd']:.3f} s. All its public names loaded, PyTorch not: "
            f"{seconds['everything']:.3f} s, of which `import numpy` {seconds['numpy']:.3f} s."
        )
    if "diagnose" in figures:
        run = figures["diagnose"]
        parts.append(
            f"## Diagnosis\n\n`isograd diagnose --json` on {run['steps']:,} steps x {run['layers']} layers "
            f"({run['bytes'] / 1e6:.0f} MB): {run['seconds']:.2f} s, interpreter start included."
        )
    if "report" in figures:
        run = figures["report"]
        parts.append(
            f"## Page\n\n`isograd report` on {run['steps']:,} steps x {run['layers']:,} layers "
            f"({run['bytes'] / 1e6:.0f} MB): {run['seconds']:.2f} s, interpreter start included; "
            f"{run['page_bytes'] / 1e6:.1f} MB of HTML beside the chart library."
        )
    facts = "\n".join(f"- {name}: {value}" for name, value in figures["machine"].items())
    return "\n\n".join([*parts, f"## Machine\n\n{facts}"]) + "\n"


def main() -> None:
    """Measure the sections asked for, keep the others' last figures, write both files."""
    parser = argparse.ArgumentParser(description="Measures what watching costs.")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"some of {','.join(SECTIONS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="scales measuring times and sizes, for a quick look")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for RESULTS.md and results.json")
    args = parser.parse_args()
    chosen = args.only.split(",")
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        parser.error(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")

    path = args.out / "results.json"
    figures = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    figures["machine"] = machine()
    threads = torch.get_num_threads()
    for name in chosen:
        start = time.perf_counter()
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = SECTIONS[name](Path(folder), args.scale)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
        path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (args.out / "RESULTS.md").write_text(report(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
