"""The same trainings for PyTorch and for Keras: architecture, first weights, batches and optimizer, in NumPy alone."""

from dataclasses import dataclass

import numpy as np

CLASSES = 3


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A classifier. `layers`: (kind, units, activation), kind "dense" or "conv"; `softmax`: its output is normalized,
    and the loss normalizes again. Weights are as PyTorch has them: [units, inputs], [units, inputs, 3, 3].
    """

    layers: tuple[tuple[str, int, str], ...]
    gain: float = 1.0
    rate: float = 0.05
    momentum: float = 0.0
    steps: int = 40
    softmax: bool = False
    exact: int = 40  # steps in which rounding has not grown beyond what is compared

    @property
    def is_image(self):
        return self.layers[0][0] == "conv"

    def inputs(self):
        return 2 if self.is_image else 10

    def weights(self):
        """(weight, bias) per layer, float32."""
        generator, found, before = np.random.default_rng(5), [], self.inputs()
        for kind, units, _ in self.layers:
            shape = (units, before, 3, 3) if kind == "conv" else (units, before)
            fan = int(np.prod(shape[1:]))
            weight = generator.normal(size=shape) * self.gain * np.sqrt(1.5 / fan)
            found.append((weight.astype("float32"), np.zeros(units, dtype="float32")))
            before = units
        return found

    def batches(self):
        """[steps, 24, …] inputs, images with channels first; [steps, 24] classes."""
        generator = np.random.default_rng(6)
        shape = (2, 6, 6) if self.is_image else (10,)
        x = generator.normal(size=(240, *shape)).astype("float32")
        way = generator.normal(size=(int(np.prod(shape)), CLASSES))
        y = (x.reshape(240, -1) @ way).argmax(1).astype("int64")
        chosen = np.arange(self.steps * 24).reshape(self.steps, 24) % 240
        return x[chosen], y[chosen]


def dense(*activations, units=16):
    return (*(("dense", units, activation) for activation in activations), ("dense", CLASSES, ""))


SCENARIOS = {
    "healthy-mlp": Scenario(layers=dense("relu", "tanh"), momentum=0.9),
    "healthy-cnn": Scenario(
        layers=(("conv", 8, "relu"), ("conv", 8, "relu"), ("dense", CLASSES, "")), rate=0.2, momentum=0.9
    ),
    "deep-sigmoid": Scenario(layers=dense(*["sigmoid"] * 12)),
    "zero-initialization": Scenario(layers=dense("relu", "relu"), gain=0.0),
    "rate-too-high": Scenario(layers=dense("relu", "relu"), rate=60.0, exact=1),
    "softmax-twice": Scenario(layers=dense("relu", "tanh"), softmax=True),
}


def told(history, diagnosis):
    """A history and a diagnosis as JSON."""
    return {
        "layers": [[layer.name.replace("_", "."), layer.kind, layer.role, layer.units] for layer in history.layers],
        "fans": [[layer.fan_in, layer.fan_out] for layer in history.layers],
        "parameters": [[p.name.replace(".", "/"), p.layer] for p in history.parameters],
        "series": {name: [s.steps.tolist(), s.values.tolist()] for name, s in history.series.items()},
        "causes": [
            [cause.finding.name, cause.finding.level, [name.replace("_", ".") for name in cause.finding.layers]]
            for cause in diagnosis.causes
        ],
        "facts": [dict(event.data) for event in history.events_of("loss-graph")],
        "text": str(diagnosis),
    }
