"""A long run that is damaged at random, under a guard: does it end as one that nothing happened to?

python benchmarks/soak.py                # 20,000 steps, one in a hundred with a fault: some minutes
python benchmarks/soak.py --steps 2000   # a quick look
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import isograd

QUIET = 60
"""First steps without a fault, in which the guard learns what the run is like."""

LATE = 2
"""Steps after which a fault shows at last: a damaged moment spoils the weights at the next step, these the loss after
it.
"""

POLICY = isograd.Guard(skip=True, clip=True, rewind=True, rewinds=10, capsules=4)
"""Damage comes so often here that a second one falls into the steps that a first one was gone back over, about one
time in four: then they look like one trouble, of which three would be the limit.
"""


# ---- the program --------------------------------------------------------------------------------------------------


class Network(nn.Module):
    """A network that normalizes its inputs with buffers of its own, and with running statistics inside."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(16))
        self.hidden, self.norm = nn.Linear(16, 64), nn.BatchNorm1d(64)
        self.middle, self.out = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 16] to [batch, 1]."""
        hidden = torch.relu(self.norm(self.hidden(x - self.mean)))
        return self.out(torch.tanh(self.middle(hidden)))


class Program:
    """Regression on noisy data that is drawn anew at every step, by the step's number."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model = Network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self._way = torch.randn(16, 4)

    def batch(self, step: int, size: int = 32) -> tuple[Tensor, Tensor]:
        """(input, target) of a step."""
        draw = torch.Generator().manual_seed(step)
        x = torch.randn(size, 16, generator=draw)
        y = torch.sin(x @ self._way / 2).sum(1, keepdim=True)
        return x, y + 0.1 * torch.randn(size, 1, generator=draw)

    def step(self, step: int, fault: Fault | None = None) -> None:
        """One training step, with a fault in it."""
        x, y = self.batch(step)
        if fault is not None and fault.before is not None:
            fault.before(self, x)
        self.optimizer.zero_grad()
        loss = (self.model(x) - y).square().mean()
        if fault is not None and fault.loss != 1:
            loss = loss * fault.loss
        loss.backward()
        if fault is not None and fault.after is not None:
            fault.after(self)
        self.optimizer.step()
        if fault is not None and fault.behind is not None:
            fault.behind(self)

    def score(self) -> float:
        """The loss on batches that are never trained on."""
        self.model.eval()
        with torch.no_grad():
            x, y = self.batch(-1, 8192)
            score = float((self.model(x) - y).square().mean())
        self.model.train()
        return score

    def is_finite(self) -> bool:
        """Whether everything that is trained is."""
        held = [value for state in self.optimizer.state.values() for value in state.values()]
        return all(bool(torch.isfinite(t).all()) for t in (*self.model.state_dict().values(), *held))


# ---- faults -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Fault:
    """What goes wrong in one step: before the forward pass, in the loss, after the backward pass, behind the step."""

    kind: str
    before: Callable[[Program, Tensor], None] | None = None
    loss: float = 1
    after: Callable[[Program], None] | None = None
    behind: Callable[[Program], None] | None = None


def _spoil(value: float) -> Callable[[Program], None]:
    def spoil(program: Program) -> None:
        gradient = program.model.middle.weight.grad
        assert gradient is not None
        gradient[3, 5] = value

    return spoil


def _spoil_input(_program: Program, x: Tensor) -> None:
    x[7, 2] = math.nan


def _spoil_buffer(program: Program, _x: Tensor) -> None:
    program.model.mean[3] = math.nan


def _spoil_moment(program: Program) -> None:
    program.optimizer.state[program.model.hidden.weight]["exp_avg"][0, 0] = math.nan


FAULTS = (
    Fault(kind="NaN loss", loss=math.nan),
    Fault(kind="Inf gradient", after=_spoil(math.inf)),
    Fault(kind="1e30 gradient", after=_spoil(1e30)),
    Fault(kind="NaN input", before=_spoil_input),
    Fault(kind="NaN buffer", before=_spoil_buffer),
    Fault(kind="damaged moment", behind=_spoil_moment),
)


def draw_faults(steps: int, rate: float, seed: int = 0) -> dict[int, Fault]:
    """Fault by step."""
    draw = random.Random(seed)
    return {step: draw.choice(FAULTS) for step in range(QUIET, steps - LATE - 1) if draw.random() < rate}


# ---- the run ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Soak:
    """What a damaged run has come to. `unseen`: faults, by step, of which the run file knows nothing. `unfounded`:
    steps at which something was done though nothing had happened. `kept`: steps that the weights come from, those
    left out and gone back over not counted; `clean_loss`: of as many without a fault and without a guard. `memory`:
    bytes of the process, by step.
    """

    faults: Mapping[str, int]
    events: Mapping[str, int]
    unseen: Mapping[int, str]
    unfounded: tuple[int, ...]
    is_finite: bool
    kept: int
    first_loss: float
    last_loss: float
    clean_loss: float
    memory: Mapping[int, int]
    run_bytes: int
    seconds: float
    seconds_a_clean_step: float


def soak(folder: Path, *, steps: int, rate: float = 0.01, seed: int = 0) -> Soak:
    """A damaged run under `POLICY`, and beside it one without faults and without a guard."""
    faults = draw_faults(steps, rate, seed)
    program, memory = Program(), {}
    first_loss = program.score()
    start = time.perf_counter()
    with isograd.watch(program.model, program.optimizer, out=folder, guard=POLICY) as run:
        for step in range(steps):
            program.step(step, faults.get(step))
            if (step + 1) % max(1, steps // 20) == 0:
                memory[step + 1] = _memory()
    seconds = time.perf_counter() - start
    events = [event for event in isograd.open_run(run.path).histories[0].events if event.kind in ACTED]
    acted = {event.step for event in events}
    gone = sum(event.data["steps"] + 1 for event in events if event.kind == "rewound")
    kept = steps - gone - sum(event.kind == "bad-step-skipped" for event in events)
    clean, clean_seconds = _clean(kept)
    return Soak(
        faults=dict(Counter(fault.kind for fault in faults.values())),
        events=dict(Counter(event.kind for event in events)),
        unseen={step: fault.kind for step, fault in faults.items() if acted.isdisjoint(range(step, step + LATE + 1))},
        unfounded=tuple(sorted(step for step in acted if faults.keys().isdisjoint(range(step - LATE, step + 1)))),
        is_finite=program.is_finite(),
        kept=kept,
        first_loss=first_loss,
        last_loss=program.score(),
        clean_loss=clean.score(),
        memory=memory,
        run_bytes=sum(path.stat().st_size for path in run.path.rglob("*") if path.is_file()),
        seconds=seconds,
        seconds_a_clean_step=clean_seconds / kept,
    )


ACTED = (
    "bad-step", "bad-step-skipped", "bad-step-clipped", "rewound", "guard-gave-up", "guard-relearned",
    "guard-refused", "guard-detached", "watch-detached",
)  # fmt: skip
"""Kinds of events that a guard writes."""


def _clean(steps: int) -> tuple[Program, float]:
    program = Program()
    start = time.perf_counter()
    for step in range(steps):
        program.step(step)
    return program, time.perf_counter() - start


def _memory() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def growth(memory: Mapping[int, int]) -> float:
    """Bytes a step from a quarter of the run on, by least squares."""
    late = [(step, size) for step, size in memory.items() if step >= max(memory) / 4]
    return float(np.polyfit(*zip(*late, strict=True), 1)[0])


def main() -> None:
    """Run one, and print what it has come to."""
    parser = argparse.ArgumentParser(description="A long run with random faults, under a guard.")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=0.01, help="share of the steps that are damaged")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = soak(Path(folder), steps=args.steps, rate=args.rate, seed=args.seed)
    print(json.dumps({**asdict(found), "bytes_a_step": growth(found.memory)}, indent=1))


if __name__ == "__main__":
    main()
