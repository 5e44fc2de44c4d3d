"""The ways to watch a program. Each attaches itself to a program and yields what its users add to the loop."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from workloads import Calls, Program

Variant = Callable[[Program, Path], AbstractContextManager[Calls]]


@contextmanager
def unwatched(_program: Program, _folder: Path) -> Iterator[Calls]:
    """Nothing at all."""
    yield Calls()


@contextmanager
def isograd_default(program: Program, folder: Path) -> Iterator[Calls]:
    """isograd as it comes: the cheap tier at every step, the deep tier on its schedule, budget 1 %."""
    import isograd

    with isograd.watch(program.model, program.optimizer, out=folder):
        yield Calls()


@contextmanager
def isograd_everything(program: Program, folder: Path) -> Iterator[Calls]:
    """Every statistic of both tiers at every step."""
    import isograd

    with isograd.watch(program.model, program.optimizer, out=folder, every=1, budget=math.inf):
        yield Calls()


@contextmanager
def guard(program: Program, folder: Path) -> Iterator[Calls]:
    """The default, and bad steps are clipped or left out; the last batches are kept for a capsule."""
    import isograd

    policy = isograd.Guard(skip=True, clip=True)
    with isograd.watch(program.model, program.optimizer, out=folder, guard=policy):
        yield Calls()


@contextmanager
def guard_without_ring(program: Program, folder: Path) -> Iterator[Calls]:
    """Likewise, with no batches kept."""
    import isograd

    policy = isograd.Guard(skip=True, clip=True, capsules=0)
    with isograd.watch(program.model, program.optimizer, out=folder, guard=policy):
        yield Calls()


@contextmanager
def guard_rewind(program: Program, folder: Path) -> Iterator[Calls]:
    """The guard with everything, and snapshots to go back to at their own cadence."""
    import isograd

    policy = isograd.Guard(skip=True, clip=True, rewind=True)
    with isograd.watch(program.model, program.optimizer, out=folder, guard=policy):
        yield Calls()


BLOCK = 8
"""Steps of a block in which a page is open."""


@contextmanager
def isograd_served(program: Program, folder: Path) -> Iterator[Calls]:
    """The default, with the live server running and a page open that fetches all it is told of.

    Both are stopped while others have their turn, which come in blocks of `BLOCK` steps: they would slow those as much.
    """
    import isograd

    step = 0

    def go_on() -> None:
        if step % BLOCK == 0:
            signal_all(signal.SIGCONT)

    def count() -> None:
        nonlocal step
        step += 1
        if step % BLOCK == 0:
            signal_all(signal.SIGSTOP)

    def signal_all(number: signal.Signals) -> None:
        for process in processes:
            process.send_signal(number)

    with isograd.watch(program.model, program.optimizer, out=folder) as watch, ExitStack() as stack:
        here = Path(__file__).parent
        path = watch.path
        assert path is not None
        server = _started(stack, [sys.executable, "-m", "isograd", "serve", str(path)])
        address = server.stdout.readline().partition(" at ")[2].split()[0] if server.stdout else ""
        page = _started(stack, [sys.executable, str(here / "page_client.py"), address])
        processes = [server, page]
        if page.stdout:
            page.stdout.readline()  # it has the data
        signal_all(signal.SIGSTOP)
        yield Calls(before_update=go_on, after_step=count)


def _started(stack: ExitStack, command: list[str]) -> subprocess.Popen[str]:
    process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    stack.callback(process.kill)
    return process


@contextmanager
def wandb_watch(program: Program, folder: Path) -> Iterator[Calls]:
    """Histograms of all gradients and weights at every step, committed by the log call that a loop has anyway."""
    import wandb

    folder.mkdir(parents=True)
    settings = wandb.Settings(console="off", silent=True, x_disable_stats=True)
    with wandb.init(mode="offline", dir=folder, project="bench", settings=settings) as run:
        run.watch(program.model, log="all", log_freq=1)
        yield Calls(after_step=lambda: run.log({}))
        run.unwatch(program.model)


@contextmanager
def tensorboard_histograms(program: Program, folder: Path) -> Iterator[Calls]:
    """`SummaryWriter.add_histogram` of every weight and every gradient at every step."""
    from torch.utils.tensorboard import SummaryWriter

    step = 0

    def write() -> None:
        nonlocal step
        for name, parameter in program.model.named_parameters():
            writer.add_histogram(f"weights/{name}", parameter, step)
            writer.add_histogram(f"gradients/{name}", parameter.grad, step)
        step += 1

    with SummaryWriter(folder) as writer:
        yield Calls(before_update=write)


@contextmanager
def lightning_grad_norm(program: Program, _folder: Path) -> Iterator[Calls]:
    """`grad_norm` of Lightning in `on_before_optimizer_step`, its values read as a logger reads them."""
    from lightning.pytorch.utilities import grad_norm

    yield Calls(before_update=lambda: [float(norm) for norm in grad_norm(program.model, norm_type=2).values()] and None)
