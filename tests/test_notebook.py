"""Cards in notebooks: complete, escaped, self-contained; one that lives in a real kernel, and costs no bit."""

import math
import re
import xml.etree.ElementTree as ET
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd import _notebook
from isograd._diagnose import diagnose
from isograd._history import History, Layer, Parameter, Series
from isograd._notebook import _POINTS, LiveCard, diagnosis_card
from isograd._record import RunFile
from isograd._runs import read_run

ODD = "<script>alert('x')</script>&\"ü"


def history(*, names=None, decades=0.9, steps=100, subject="model", loss=None):
    """Ten layers whose signal loses `decades` per layer."""
    names = names or [f"net.{i}" for i in range(10)]
    at = np.arange(steps)
    signal = np.tile(10.0 ** (-2 - decades * np.arange(len(names) - 1, -1, -1)), (steps, 1))
    return History(
        subject=subject,
        layers=tuple(Layer(name=name, kind="linear", position=i, units=64) for i, name in enumerate(names)),
        parameters=tuple(Parameter(name=f"{name}.weight", layer=name, shape=(64, 64)) for name in names),
        groups=({"optimizer": "SGD", "lr": 0.1},),
        series={
            "loss": Series(at, np.full(steps, 2.3026) if loss is None else loss),
            "loss_nonfinite": Series(at, np.zeros(steps)),
            "global_grad_norm": Series(at, np.sqrt((signal**2).sum(1))),
            "grad_norm": Series(at, signal),
            "grad_max": Series(at, signal / 64),
            "grad_nonfinite": Series(at, np.zeros_like(signal)),
            "signal_norm": Series(at, signal),
            "signal_nonfinite": Series(at, np.zeros_like(signal)),
        },
    )


def parsed(card):
    """The card as a tree; it is well-formed XML, so that no reader of HTML can see another."""
    return ET.fromstring(card)


def words(card):
    text = " ".join(" ".join(parsed(card).itertext()).split())
    return re.sub(r" (?=[.,])", "", text)


# ---- what a card says ---------------------------------------------------------------------------------------------


def test_a_diagnosis_says_what_the_terminal_says():
    """The card names the verdict, the first cause, its level, steps and number, what it explains and what to do."""
    diagnosis = diagnose([history()], run="run-1")
    cause = diagnosis.causes[0]

    said = words(diagnosis._repr_html_())
    assert said.startswith("isograd: not healthy, ")
    assert f"First cause: {cause.finding.name}." in said or f"Seen first: {cause.finding.name}." in said
    assert " ".join(cause.finding.message.split()) in said
    assert "run-1" in said
    assert f"Remedies: {', '.join(cause.remedies)}." in said
    assert "From layer net.9 back to net.0 it falls by 8.1 decades at step 0" in said


def test_health_is_said():
    """A healthy run is said to be so, with how many rules looked."""
    healthy = history(decades=0.0, loss=2.3 * np.exp(-np.arange(100) / 50))

    assert re.match(
        r"isograd: healthy\. \d+ rules looked at 100 steps of model and found no fault\.",
        words(diagnosis_card(diagnose([healthy]))),
    )


def test_a_run_shows_itself(tmp_path):
    """A run read from disk shows its verdict, its id and its state; nothing recorded is no error."""
    file = RunFile.create(tmp_path, meta={"state": "finished"})
    for step in range(5):
        file.write_row("model", step, "cheap", {"loss": 1.0 / (step + 1)})
    file.close()
    empty = RunFile.create(tmp_path, meta={})
    empty.close()

    said = words(read_run(file.path)._repr_html_())
    assert f"{file.id}, finished" in said
    assert "loss: 1 to 0.2 in 5 steps" in said
    assert words(read_run(empty.path)._repr_html_()).startswith("isograd: ")
    assert len(repr(read_run(file.path))) < 2000


def test_two_subjects_are_told_apart():
    """Each subject has its own charts, named."""
    said = words(diagnosis_card(diagnose([history(subject="generator"), history(subject="critic", decades=0)])))

    assert "loss of generator" in said
    assert "loss of critic" in said


def test_names_are_escaped():
    """A layer called `<script>` is text, in the words and in the charts' labels."""
    card = diagnosis_card(diagnose([history(names=[f"{ODD}{i}" for i in range(10)], subject=ODD)], run=ODD))

    assert "<script" not in card
    assert f"From layer {ODD}9 back to {ODD}0" in words(card)
    tags = {element.tag for element in parsed(card).iter()}
    assert tags <= {"div", "span", "b", "br", "svg", "polyline", "path", "figure", "figcaption"}


def test_a_card_needs_nothing_else():
    """No script, no address, no image: an SVG inline, with a label for who cannot see it."""
    card = diagnosis_card(diagnose([history()]))

    assert [] == re.findall(r"<(?:script|link|img|style)|https?:|url\(", card)
    labels = [element.get("aria-label") for element in parsed(card).iter("svg")]
    assert 2 == len(labels)
    assert labels[0].startswith("loss: 2.3 to 2.3 in 100 steps")


@pytest.mark.parametrize("steps", [100, 100_000])
def test_a_card_is_small(steps):
    """A long run makes no larger card."""
    assert len(diagnosis_card(diagnose([history(steps=steps, names=["a", "b"])]))) < 12_000


@given(st.lists(st.floats(), min_size=1, max_size=3 * _POINTS))
def test_any_loss_can_be_drawn(losses):
    """Whatever the numbers, the chart lies within its frame, and each gap is a tick."""
    at = np.arange(len(losses))
    card = diagnosis_card(diagnose([History(series={"loss": Series(at, losses)})]))

    for line in parsed(card).iter("polyline"):
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert all(0 <= x <= 360 and 0 <= y <= 56 for x, y in points)
    if len(losses) <= _POINTS and any(map(math.isfinite, losses)):
        ticks = sum(path.get("d").count("M") for path in parsed(card).iter("path"))
        assert sum(not math.isfinite(loss) for loss in losses) == ticks


# ---- in a notebook ------------------------------------------------------------------------------------------------

TRAIN = """
import isograd, torch, time
from torch import nn

def train(show, pause=0.0, fail=False):
    torch.manual_seed(0)
    sigmoids = [m for _ in range(6) for m in (nn.Linear(8, 8), nn.Sigmoid())]
    net = nn.Sequential(*sigmoids, nn.Dropout(0.1), nn.Linear(8, 3))
    optimizer = torch.optim.Adam(net.parameters())
    with isograd.watch(net, optimizer, out=folder) as run:
        if show:
            run.show()
        for step in range(30):
            x, y = torch.randn(16, 8), torch.randint(3, (16,))
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            time.sleep(pause)
            if fail and step == 20:
                raise RuntimeError("enough")
    bits = b"".join(p.detach().numpy().tobytes() for p in net.parameters())
    return run, bits, torch.get_rng_state().numpy().tobytes()
"""


class Kernel:
    """A Jupyter kernel of its own and what it publishes."""

    def __init__(self, client):
        self._client = client

    def run(self, code):
        """Messages that the code publishes, as (type, content)."""
        found = []
        reply = self._client.execute_interactive(
            code, timeout=60, output_hook=lambda message: found.append((message["msg_type"], message["content"]))
        )
        assert "ok" == reply["content"]["status"], reply["content"]
        return found


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    from jupyter_client.manager import KernelManager

    manager = KernelManager(kernel_name="python3")
    manager.start_kernel()
    client = manager.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        kernel = Kernel(client)
        kernel.run(f"folder = {str(tmp_path_factory.mktemp('runs'))!r}\n{TRAIN}")
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()
        manager.context.destroy(linger=0)


def cards(messages):
    """(type of message, id of the display, words of the card), in order."""
    shown = [(kind, content) for kind, content in messages if kind in ("display_data", "update_display_data")]
    return [(kind, content["transient"]["display_id"], words(content["data"]["text/html"])) for kind, content in shown]


def test_a_card_is_replaced_in_place(kernel):
    """`show` publishes one display, refreshed every 2 s while the program trains and once at the end with its state."""
    shown = cards(kernel.run("run, *_ = train(True, pause=0.16)"))

    assert ["display_data", *["update_display_data"] * (len(shown) - 1)] == [kind for kind, _, _ in shown]
    assert 1 == len({name for _, name, _ in shown})
    assert 3 <= len(shown) <= 5  # at the start, after each of some 5 s / 2 s, at the end
    assert "no step yet" in shown[0][2]
    assert ", running" in shown[1][2]
    assert "30 steps of net" in shown[-1][2]
    assert ", finished" in shown[-1][2]


def test_a_card_that_is_slow_to_draw_is_drawn_seldom(monkeypatch):
    """Beyond its first second, drawing takes no more than its share of the time since the card was made."""
    pytest.importorskip("IPython")
    clock = [0.0]
    monkeypatch.setattr(_notebook, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    drawn = []

    def make():
        clock[0] += 0.3
        drawn.append(clock[0])
        return ""

    class Handle:
        def update(self, html):
            """A display that takes everything."""

    card = LiveCard(make)
    card._handle = Handle()
    while clock[0] < 1000:
        clock[0] += 0.01
        card.refresh()

    assert np.all(np.diff(drawn) >= 2)
    assert 1.0 + 0.005 * 1000 >= 0.3 * (len(drawn) - 1)
    assert len(drawn) >= 15


def test_a_failed_run_says_so(kernel):
    """What ended the run is on the card's last state."""
    code = "try:\n    train(True, fail=True)\nexcept RuntimeError:\n    pass"

    assert "The script raised RuntimeError at step 20." in cards(kernel.run(code))[-1][2]


def test_showing_changes_no_bit(kernel):
    """Weights and generators end in the same bits with a card that is drawn at every step, and without one."""
    code = (
        "import isograd._notebook as notebook\n"
        "plain = train(False)[1:]\n"
        "kept = notebook._INTERVAL, notebook._SHARE\n"
        "notebook._INTERVAL, notebook._SHARE = 0.0, 1e9\n"
        "shown = train(True)[1:]\n"
        "notebook._INTERVAL, notebook._SHARE = kept\n"
        "print(plain == shown)"
    )
    messages = kernel.run(code)

    assert 30 <= len(cards(messages))
    assert "True\n" == "".join(content["text"] for kind, content in messages if kind == "stream")


def test_values_show_themselves_as_results(kernel):
    """The watch, the run and the diagnosis as a cell's last line are shown as HTML."""
    kernel.run("watch, *_ = train(False)")

    for expression in ("watch", "watch.run()", "watch.diagnose()"):
        ((_, content),) = [message for message in kernel.run(expression) if message[0] == "execute_result"]
        assert "30 steps of net" in words(content["data"]["text/html"])


def test_drawing_counts_as_watching(kernel):
    """The time that the card takes is in the watch's overhead, and a card that fails to be drawn ends nothing else."""
    code = (
        "import isograd._watch as w\n"
        "real = w.Watch._drawn\n"
        "w.Watch._drawn = lambda self: (time.sleep(0.5), real(self))[1]\n"
        "run, *_ = train(True)\n"
        "print(run._shield.seconds >= 0.5)\n"
        "def broken(self):\n"
        "    if self.step: raise ValueError('no')\n"
        "    return real(self)\n"
        "w.Watch._drawn = broken\n"
        "run, *_ = train(True, pause=0.1)\n"
        "w.Watch._drawn = real\n"
        "print(run.step, len(run.run().histories[0]['loss']), run._shield.is_down)"
    )

    assert "True\n30 30 False\n" == "".join(c["text"] for kind, c in kernel.run(code) if kind == "stream")


def test_no_notebook_no_card(tmp_path, capsys):
    """Outside of a notebook, and under ISOGRAD=off, `show` does nothing."""
    import torch

    import isograd

    assert not LiveCard.is_possible()
    model = torch.nn.Linear(1, 1)
    with isograd.watch(model, torch.optim.SGD(model.parameters(), 0.1), out=tmp_path) as run:
        run.show()
    assert ("", "") == capsys.readouterr()


def test_a_terminal_of_ipython_gets_no_card():
    """IPython without a kernel cannot replace what it printed: nothing is printed."""
    from IPython.core.interactiveshell import InteractiveShell

    InteractiveShell.instance()
    try:
        assert not LiveCard.is_possible()
    finally:
        InteractiveShell.clear_instance()
