"""Run a script as `isograd run` does, and capture one step of it: capture_script.py RUNS WHICH SCRIPT [ARGS…].

WHICH is the number of the step, or "bad" for the first one whose loss or gradient is not finite, or has a squared norm
that is not.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from isograd._launch import launch
from isograd._watch import Shield
from isograd.frameworks.torch import _describe as describe
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._effects import parameters_of
from isograd.frameworks.torch._flight import FlightRecorder


class Capturing:
    """Hears of steps behind the watch; the script ends with the captured one."""

    def __init__(self, runs, which):
        self.runs, self.which, self.recorder = runs, which, None
        self.steps, self.losses, self.roots, self.done, self.scaled = {}, [], {}, False, 1.0

    def made_optimizer(self, optimizer):
        if self.recorder is None:
            (folder,) = [path for path in self.runs.iterdir() if path.is_dir()]
            self.recorder = FlightRecorder(folder, on_warning=sys.exit, shield=Shield(sys.exit))
            self.recorder.listen()
        self.steps[optimizer] = 0
        found = describe.roots_holding(parameters_of(optimizer))
        self.roots[optimizer] = {f"root{i}" if i else "model": root for i, root in enumerate(found)}
        self.recorder.follow(self.roots[optimizer])

    def before_backward(self, tensors, inputs):
        if inputs is None:
            self.losses += [tensor.detach() for tensor in tensors if tensor.numel() == 1]

    def before_scaled_step(self, scaler):
        self.scaler, self.scaled = scaler, scaler.get_scale()

    def before_step(self, optimizer, closure):
        loss = sum(map(float, self.losses)) / self.scaled
        gradients = [p.grad for p in parameters_of(optimizer) if p.grad is not None]
        values = [torch.tensor(loss), *(gradient.float().square().sum() for gradient in gradients)]
        bad = not all(bool(torch.isfinite(value).all()) for value in values)
        if not self.done and (bad if self.which == "bad" else self.steps[optimizer] == int(self.which)):
            self.capture(optimizer, loss, gradients)

    def capture(self, optimizer, loss, gradients):
        norm = float(torch.stack([g.double().norm() for g in gradients]).norm()) if gradients else 0.0
        why = [SimpleNamespace(channel="loss", layer=None, observed=loss, limit=1e3),
               SimpleNamespace(channel="global_grad_norm", layer=None, observed=norm, limit=1e3)]  # fmt: skip
        self.recorder.capture(
            subject="model", step=self.steps[optimizer], why=why, action="observed",
            roots=self.roots[optimizer], optimizer=optimizer, loss=loss, scaler=getattr(self, "scaler", None),
        )  # fmt: skip
        self.done = True

    def after_step(self, optimizer):
        if optimizer not in self.steps:
            return
        self.recorder.end_step(self.steps[optimizer])
        self.steps[optimizer] += 1
        self.losses.clear()
        if self.done:
            self.recorder.close()

    def after_scaled_step(self, optimizer, stepped):
        if not stepped:
            self.before_step(optimizer, False)
            self.after_step(optimizer)

    def after_backward(self):
        return None

    def clipped(self, norm, limit):
        return None

    packs_saved_tensors = after_backward


def main():
    runs, which, *script = sys.argv[1:]
    sys.argv = script
    path = Path(runs)
    path.mkdir(exist_ok=True)
    hearing = Capturing(path, which)
    taps.subscribe(hearing)
    result = launch(script, out=path)
    if hearing.recorder is not None:
        hearing.recorder.close()
    print(next(iter(path.glob("*/capsules/*")), "no capsule"))
    sys.exit(result.status)


if __name__ == "__main__":
    main()
