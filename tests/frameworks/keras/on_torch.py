"""Trains every scenario on PyTorch and writes what isograd recorded and found: `python on_torch.py FILE`."""

import json
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from scenarios import SCENARIOS, told
from torch import nn
from torch.nn import functional as F

import isograd

ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid}


def model_of(scenario):
    found, before = OrderedDict(), scenario.inputs()
    for number, (kind, units, activation) in enumerate(scenario.layers):
        if kind == "dense" and before != scenario.inputs() and scenario.is_image:
            found["pool"], found["flatten"] = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        name = f"layer{number}"
        found[name] = nn.Conv2d(before, units, 3, padding=1) if kind == "conv" else nn.Linear(before, units)
        if activation:
            found[f"{name}_{activation}"] = ACTIVATIONS[activation]()
        before = units
    if scenario.softmax:
        found["softmax"] = nn.Softmax(1)
    model = nn.Sequential(found)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), [v for pair in scenario.weights() for v in pair], strict=True):
            parameter.copy_(torch.from_numpy(value))
    return model


def trained(scenario):
    model = model_of(scenario)
    optimizer = torch.optim.SGD(model.parameters(), lr=scenario.rate, momentum=scenario.momentum)
    with tempfile.TemporaryDirectory() as folder:
        with isograd.watch(model, optimizer, out=folder, every=1, budget=1.0) as run:
            for x, y in zip(*map(torch.from_numpy, scenario.batches()), strict=True):
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
        (history,) = run.histories()
        return told(history, run.diagnose())


if __name__ == "__main__":
    torch.manual_seed(0)
    Path(sys.argv[1]).write_text(json.dumps({name: trained(one) for name, one in SCENARIOS.items()}))
