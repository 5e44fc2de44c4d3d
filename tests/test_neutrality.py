"""Training ends in the same bits watched and unwatched: weights, buffers, optimizer state, random-number generators.

Watched means the most that can be read: both tiers at every step, with no budget.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import random
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, multiprocessing, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import isograd

STEPS = 6


class Mixed(nn.Module):
    """Convolution, in-place ReLU, batch normalization, dropout, attention, a recurrence, a tied and a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.norm = nn.BatchNorm2d(4)
        self.rnn = nn.GRU(8, 12, batch_first=True)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.tied = nn.Linear(12, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.drop = nn.Dropout(0.1)
        self.out = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.act(self.conv(x))).mean(1)
        h = self.rnn(h)[0]
        h = h + self.attention(h, h, h, need_weights=False)[0]
        h = torch.tanh(self.tied(F.gelu(self.tied(h)))) + self.frozen(h)
        return self.out(self.drop(h[:, -1]))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(5, 1, 8, 8), torch.randint(0, 3, (5,))


def plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def clipped(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        x, y = batch()
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()


def accumulated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        optimizer.zero_grad()
        for _ in range(3):
            x, y = batch()
            (F.cross_entropy(model(x), y) / 3).backward()
        optimizer.step()


def closure(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        x, y = batch()

        def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(evaluate)


def autocast(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        x, y = batch()
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()


def scaled(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for step in range(STEPS):
        x, y = batch()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        scaler.scale(loss * (math.inf if step == 2 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()


def evaluated(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        plain(model, optimizer)
        model.eval()
        with torch.no_grad():
            model(batch()[0])
        model(batch()[0])
        model.train()


def checkpointed(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for step in range(STEPS):
        x, y = batch()
        optimizer.zero_grad()
        out = checkpoint(model, x.requires_grad_(), use_reentrant=bool(step % 2))
        F.cross_entropy(out, y).backward()
        optimizer.step()


def copied(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(STEPS):
        plain(model, optimizer)
        twin = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(twin))
        assert torch.equal(again.eval()(x := batch()[0]), twin.eval()(x))


def stepwise(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    for _ in range(STEPS):
        x, y = batch()
        loss = F.cross_entropy(model(x), y)
        gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
        for parameter, gradient in zip((p for p in model.parameters() if p.requires_grad), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        scheduler.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-3),
    "adam-foreach": lambda p: torch.optim.Adam(p, 1e-3, foreach=True),
    "adam-fused": lambda p: torch.optim.Adam(p, 1e-3, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-3, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
}
LOOPS = (plain, clipped, accumulated, autocast, scaled, evaluated, checkpointed, copied, stepwise, closure)


def outcome(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Everything that must be the same."""
    return {
        "model": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def same(left: Any, right: Any) -> bool:
    """Whether two nested outcomes agree bit for bit (NaN equals NaN of the same bits)."""
    if isinstance(left, Tensor):
        return torch.equal(_bits(left), _bits(right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right) or left != left


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def train(make: Callable[[Any], torch.optim.Optimizer], loop: Callable[..., None], out: Path | None) -> dict[str, Any]:
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Mixed()
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    if out is None:
        loop(model, optimizer)
    else:
        with isograd.watch(model, optimizer, out=out, every=1, budget=math.inf) as run:
            loop(model, optimizer)
        assert run.step >= STEPS - 1
    assert not any(module._forward_hooks for module in model.modules())
    return outcome(model, optimizer)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer(name: str, tmp_path: Path) -> None:
    """An optimizer ends in the same bits, fused or not."""
    unwatched = train(OPTIMIZERS[name], plain, None)
    watched = train(OPTIMIZERS[name], plain, tmp_path)

    assert same(unwatched, watched)


@pytest.mark.parametrize("name", ["adamw", "adamw-fused"])
@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_every_kind_of_loop(name: str, loop: Callable[..., None], tmp_path: Path) -> None:
    """A training loop ends in the same bits: clipping, accumulation, mixed precision, checkpointing, copies …"""
    unwatched = train(OPTIMIZERS[name], loop, None)
    watched = train(OPTIMIZERS[name], loop, tmp_path)

    assert same(unwatched, watched)


def test_line_search(tmp_path: Path) -> None:
    """LBFGS, which evaluates its closure several times a step, ends in the same bits."""

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(parameters, lr=0.1, max_iter=3)

    assert same(train(make, closure, None), train(make, closure, tmp_path))


def test_optimizer_in_backward(tmp_path: Path) -> None:
    """Optimizers that step inside the backward pass, one per parameter, end in the same bits."""

    def run(out: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        optimizers = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}

        def step(parameter: Tensor) -> None:
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        watch = isograd.watch(out=out, every=1, budget=math.inf) if out else None
        for _ in range(STEPS):
            model(torch.randn(4, 6)).square().mean().backward()
        if watch is not None:
            watch.close()
            (history,) = watch.histories()
            assert history.num_steps == STEPS
            assert not np.isnan(history["grad_norm"].values).any()
        return model.state_dict()

    assert same(run(None), run(tmp_path))


def test_compiled(tmp_path: Path) -> None:
    """A compiled model ends in the same bits, without a graph break, and its layers are named as unmeasured."""

    def run(out: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.AdamW(compiled.parameters(), 1e-2)
        watch = isograd.watch(compiled, optimizer, out=out, every=1, budget=math.inf) if out else None
        for _ in range(STEPS):
            optimizer.zero_grad()
            compiled(torch.randn(4, 6)).square().mean().backward()
            optimizer.step()
        if watch is not None:
            watch.close()
            (history,) = watch.histories()
            assert "compiled" in history.unmeasured["output_rms"]
            assert [p.name for p in history.parameters] == ["0.weight", "0.bias", "2.weight", "2.bias"]
            assert not np.isnan(history["grad_norm"].values).any()
            assert torch._dynamo.utils.counters["graph_break"] == {}
        return model.state_dict()

    assert same(run(None), run(tmp_path))


def test_compiled_after_the_watch_began(tmp_path: Path) -> None:
    """A function compiled over a watched model, hooks in place, breaks no graph."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with isograd.watch(model, optimizer, out=tmp_path, every=1, budget=math.inf) as run:
        loss = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager", fullgraph=True)
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(torch.randn(4, 6)).backward()
            optimizer.step()

    assert torch._dynamo.utils.counters["graph_break"] == {}
    assert "compiled" in run.histories()[0].unmeasured["output_rms"]


def _train_rank(rank: int, port: int, folder: str, watched: bool) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 2))
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(parallel.parameters(), 1e-2)
    watch = isograd.watch(parallel, optimizer, out=f"{folder}/runs", every=1, budget=math.inf) if watched else None
    torch.manual_seed(1)
    x, y = torch.randn(STEPS, 8, 6), torch.randint(0, 2, (STEPS, 8))
    mine = slice(4 * rank, 4 * rank + 4)
    for step in range(STEPS):
        optimizer.zero_grad()
        F.cross_entropy(parallel(x[step, mine]), y[step, mine]).backward()
        optimizer.step()
    if watch is not None:
        watch.close()
        (history,) = watch.histories()
        names = [layer.name for layer in history.layers]
        readings = {name: series.values for name, series in history.series.items()}
        torch.save({"names": names, "readings": readings, "path": watch.path}, f"{folder}/seen-{rank}")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, f"{folder}/end-{rank}-{watched}")
    torch.distributed.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_data_parallel(tmp_path: Path) -> None:
    """Two ranks end in the same bits, see the same global numbers as one process would, and rank 0 alone writes."""
    for watched in (False, True):
        multiprocessing.spawn(_train_rank, (_free_port(), str(tmp_path), watched), nprocs=2)
    for rank in (0, 1):
        unwatched = torch.load(tmp_path / f"end-{rank}-False")
        assert same(unwatched, torch.load(tmp_path / f"end-{rank}-True"))
    first, second = (torch.load(tmp_path / f"seen-{rank}", weights_only=False) for rank in (0, 1))

    assert first["path"] is not None and second["path"] is None
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert first["readings"].keys() == second["readings"].keys()
    for name, values in first["readings"].items():
        np.testing.assert_array_equal(values, second["readings"][name], err_msg=name)
    _assert_as_one_process(first, tmp_path)


def _assert_as_one_process(seen: dict[str, Any], folder: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Sigmoid(), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(1)
    x, y = torch.randn(STEPS, 8, 6), torch.randint(0, 2, (STEPS, 8))
    with isograd.watch(model, optimizer, out=folder / "single", every=1, budget=math.inf) as run:
        for step in range(STEPS):
            optimizer.zero_grad()
            F.cross_entropy(model(x[step]), y[step]).backward()
            optimizer.step()
    (single,) = run.histories()
    columns = [seen["names"].index(layer.name) for layer in single.layers]
    for name in ("loss", "global_grad_norm", "grad_norm", "weight_norm", "update_ratio"):
        np.testing.assert_allclose(seen["readings"][name], single[name].values, rtol=2e-4, err_msg=name)
    for name in (
        "output_rms",
        "output_mean",
        "output_max",
        "signal_norm",
        "signal_max",
        "saturation",
        "activation_slope",
    ):
        ours = seen["readings"][name][:, columns]
        np.testing.assert_allclose(ours, single[name].values, rtol=2e-4, atol=1e-7, err_msg=name)
