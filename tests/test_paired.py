"""`isograd.verify`: a treatment measured on a training function, in the process that asks."""

import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isograd
from isograd._changes import CannotApply, ClipGradients, InsertNormalization, SetHyperparameter

X = torch.randn(256, 20, generator=torch.Generator().manual_seed(0))
Y = (X @ torch.randn(20, 4, generator=torch.Generator().manual_seed(1))).argmax(1)


CLIP = ClipGradients(method="norm", limit=1.0)


def tower(activation=nn.Sigmoid, depth=8, steps=10**6, lr=0.05):
    """A classifier that trains until it is ended."""
    model = nn.Sequential(
        nn.Linear(20, 32), activation(), *[m for _ in range(depth) for m in (nn.Linear(32, 32), activation())],
        nn.Linear(32, 4),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for _ in range(steps):
        rows = torch.randint(0, 256, (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(X[rows]), Y[rows]).backward()
        optimizer.step()


def test_what_cures_is_told_from_what_does_not():
    """Normalization brings a tower of sigmoids to learn on every seed, clipping changes nothing of it."""
    cured = isograd.verify(InsertNormalization(kind="batch"), tower, seeds=range(3), steps=60)
    clipped = isograd.verify(ClipGradients(method="norm", limit=1e9), tower, seeds=range(3), steps=60)

    assert cured.helps
    assert cured.effect.low > 0.5
    assert 3 == len(cured.ends)
    assert (0.0, 0.0, 0.0) == (clipped.effect.value, clipped.effect.low, clipped.effect.high)
    assert "no-effect" == clipped.outcome


def test_verdict_is_a_sentence():
    """Printed, a verdict says the outcome, how often, from where to where, and by how much."""
    told = str(
        isograd.verify(SetHyperparameter(name="lr", factor=0.0), lambda: tower(nn.ReLU, 1), seeds=[4, 9], steps=60)
    )

    number = r"[-+]?[0-9.]+"
    assert re.match(
        rf"(worse|inconclusive) on 2 pairs of runs: loss {number} untreated, {number} treated, "
        rf"effect {number} \[{number}, {number}\] of the progress made\.",
        told,
    )


def test_a_function_of_the_seed_gets_it():
    """`train(seed)` is called with each seed twice, and both calls draw the same numbers."""
    calls = []

    def train(seed):
        calls.append((seed, torch.rand(1).item(), random.random(), np.random.rand()))
        tower(nn.ReLU, 1, steps=3)

    isograd.verify(CLIP, train, seeds=[3, 5], steps=10)

    assert [3, 3, 5, 5] == [seed for seed, *_ in calls]
    assert calls[0] == calls[1]
    assert calls[0][1:] != calls[2][1:]


def test_generators_and_folder_stay(tmp_path, monkeypatch):
    """Afterwards all generators stand where they stood, no file is left, and training can go on as ever."""
    monkeypatch.chdir(tmp_path)
    states = lambda: (torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist())  # noqa: E731
    before = states()
    isograd.verify(CLIP, lambda: tower(nn.ReLU, 1), seeds=[0], steps=5)

    assert before == states()
    assert [] == [*tmp_path.iterdir()]


def test_an_exception_ends_a_run_as_a_loss(capsys):
    """A training function that raises under the treatment alone makes the treatment worse, with its words."""

    def train():
        model = nn.Linear(20, 4)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(20):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(X), Y)
            loss.backward()
            optimizer.step()
            if step == 10 and model.weight.abs().max() > 10:
                raise RuntimeError("that is too high")

    verdict = isograd.verify(SetHyperparameter(name="lr", value=700.0), train, seeds=range(2), steps=15)

    assert "worse" == verdict.outcome
    assert "the treated program fails: RuntimeError: that is too high" == verdict.why
    assert "RuntimeError: that is too high" in str(verdict)


def test_proposals_can_be_verified(tmp_path):
    """What `treat` proposes for a diagnosis is taken as it is, and its cause decides what counts as resolved."""
    torch.manual_seed(0)
    with isograd.watch(out=tmp_path) as run:
        tower(steps=60)
    diagnosis = run.diagnose()
    proposals = {t.remedies[0].remedy_name(): t for t in isograd.treat(diagnosis)}
    verdict = isograd.verify(proposals["insert-normalization"], tower, seeds=range(3), steps=120)

    assert "saturating-activations" == diagnosis.causes[0].finding.name
    assert "resolved" == verdict.outcome
    assert "saturating-activations" in verdict.resolved


def broken():
    raise OSError("no data")


MISTAKES = [
    (lambda: isograd.verify((), tower), ValueError, "changes nothing by itself"),
    (lambda: isograd.verify(CLIP, 3), TypeError, "must be a function that trains a model, not int"),
    (lambda: isograd.verify(CLIP, tower, seeds=()), ValueError, "0 seeds"),
    (lambda: isograd.verify(CLIP, tower, steps=0), ValueError, "0 steps"),
    (lambda: isograd.verify(CLIP, lambda: None), ValueError, "took no optimizer step"),
    (lambda: isograd.verify(CLIP, broken), OSError, "no data"),
    (lambda: isograd.verify(SetHyperparameter(name="betas", value=1.0), tower, steps=5), CannotApply, "betas"),
]


@pytest.mark.parametrize("call, error, words", MISTAKES)
def test_mistakes_are_told_in_a_sentence(call, error, words):
    """What cannot be compared is refused: no change, no function, no seed, no step, no place for the treatment."""
    with pytest.raises(error, match=words):
        call()
