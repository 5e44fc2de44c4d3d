"""The page of a run in a real browser: every chart, every control, no error, no request, nothing taken for HTML."""

import copy
import json

import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe

import isograd
from isograd._history import Layer, Parameter
from isograd._page import ASSETS, asset, render
from isograd._page_data import read_page
from isograd._record import RunFile

EVIL = "<script>alert(1)</script>"


# ---- runs -----------------------------------------------------------------------------------------------------------


def record(root, *, depth=8, steps=120, decades=0.4, gap=(), name="net.{}", script="train.py", bad_step=None):
    """A run written as training would: `depth` linear layers, losing `decades` of the signal per layer."""
    fall = 10.0 ** (-1 - decades * np.arange(depth - 1, -1, -1))
    names = [name.format(i) for i in range(depth)]
    run = RunFile.create(root, meta={"script": script, "state": "running", "overhead": 0.004})
    run.add_layers("model", [Layer(name=n, kind="linear", position=i, units=64) for i, n in enumerate(names)])
    run.add_parameters("model", [Parameter(name=f"{n}.weight", layer=n, shape=(64, 64)) for n in names])
    for step in range(steps):
        if step in gap:
            continue
        bad = step == bad_step
        signal = np.where(np.arange(depth) == 0, np.nan, fall) if bad else fall * (1 + 0.1 * np.sin(step))
        readings = {
            "loss": np.nan if bad else 2.3 * np.exp(-step / 50),
            "loss_nonfinite": int(bad),
            "global_grad_norm": np.linalg.norm(fall),
            "global_grad_norm_unclipped": 2 * np.linalg.norm(fall),
            "clip_factor": 0.5,
            "learning_rate": [0.1],
            "step_seconds": 0.1,
            "watch_seconds": 0.001,
            "grad_norm": fall,
            "grad_max": fall / 64,
            "grad_nonfinite": np.zeros(depth),
        }
        run.write_row("model", step, "cheap", readings)
        deep = {
            "signal_norm": signal,
            "signal_nonfinite": np.where(np.isnan(signal), 3, 0),
            "saturation": np.full(depth, 0.1),
            "dead_fraction": np.full(depth, 0.2),
            "update_ratio": fall / 10,
            "weight_norm": np.ones(depth),
        }
        run.write_row("model", step, "deep", deep)
    run.set_meta(state="finished", steps=steps)
    run.close()
    return run.path


def train(model, optimizer, *, spoil=None, step=0):
    """One step on a task that can be learned; at step `spoil` the inputs are NaN."""
    x = torch.randn(64, 16)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    loss = torch.nn.functional.cross_entropy(model(x * torch.nan if step == spoil else x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def network(depth, activation):
    layers = [torch.nn.Linear(16, 32), activation()]
    for _ in range(depth):
        layers += [torch.nn.Linear(32, 32), activation()]
    return torch.nn.Sequential(*layers, torch.nn.Linear(32, 4))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def healthy(folder):
    torch.manual_seed(0)
    model = network(1, torch.nn.ReLU)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    with isograd.watch(model, optimizer, out=folder) as run:
        for _ in range(200):
            train(model, optimizer)
    return read_page(run.path, {})


@pytest.fixture(scope="module")
def sick(folder):
    return read_page(record(folder, decades=1.0), {})


@pytest.fixture(scope="module")
def nan_at_once(folder):
    model = network(2, torch.nn.ReLU)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with isograd.watch(model, optimizer, out=folder) as run:
        for step in range(12):
            train(model, optimizer, spoil=0, step=step)
    return read_page(run.path, {})


@pytest.fixture(scope="module")
def two_subjects(folder):
    generator, critic = network(1, torch.nn.ReLU), network(1, torch.nn.Tanh)
    first, second = (torch.optim.SGD(model.parameters(), lr=0.1) for model in (generator, critic))
    with isograd.watch(generator, critic, first, second, out=folder) as run:
        for _ in range(40):
            train(generator, first)
            train(critic, second)
    return read_page(run.path, {})


@pytest.fixture(scope="module")
def damaged(folder):
    """A run file of which the end is missing."""
    path = record(folder, steps=400, depth=20) / "run.db"
    content = path.read_bytes()
    path.write_bytes(content[: int(0.6 * len(content))])
    return read_page(path.parent, {})


@pytest.fixture(scope="module")
def tried(sick):
    """The sick run with what `isograd fix` leaves beside one."""
    steps = list(range(40))
    curves = {"steps": steps, "baseline": [[2.3] * 40] * 3, "treated": [[2.3 * 0.9**s for s in steps]] * 3}
    trial = {"outcome": "resolved", "seconds": 3.0, "pairs": 3, "resolved": ["dead-units"], "code": "x = 1\n"}
    gain, harm = {"value": 0.9, "low": 0.8, "high": 1}, {"value": -0.2, "low": None, "high": None}
    return {
        **copy.deepcopy(sick),
        "fix": {
            "best": 0,
            "trials": [
                {**trial, "treatment": "insert-shortcuts", "effect": gain, "curves": curves},
                {**trial, "treatment": ["a", "b"], "outcome": "worse", "effect": harm},
            ],
        },
    }


# ---- the browser ----------------------------------------------------------------------------------------------------


class Opened:
    """A page that was opened from a file, without a network; whatever goes wrong in it is kept."""

    def __init__(self, browser, file, *, width=1280, height=900, theme="light", address=""):
        self.context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
        self.context.set_offline(True)
        self.context.grant_permissions(["clipboard-read", "clipboard-write"])
        self.errors, self.requests = [], []
        self.context.route("**", self._route)
        self.page = self.context.new_page()
        self.page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: (self.errors.append(f"dialog {dialog.message}"), dialog.dismiss()))
        self.page.goto(f"file://{file}{address}")
        self.page.wait_for_selector("html[data-ready]")
        self.page.wait_for_function("window.Plotly !== undefined")

    def _route(self, route):
        if route.request.url.startswith("file:"):
            route.continue_()
        else:
            self.requests.append(route.request.url)
            route.abort()

    def draw_all(self):
        """Draw what has not been scrolled to, as for print."""
        self.page.evaluate("dispatchEvent(new Event('beforeprint')); dispatchEvent(new Event('afterprint'))")

    def drawn(self):
        """Ids of the charts that are there and have been drawn."""
        return self.page.evaluate(
            "[...document.querySelectorAll('main figure:not([hidden])')]"
            ".filter(f => f.querySelector('.js-plotly-plot .main-svg')).map(f => f.id.replace('chart-', ''))"
        )

    def count(self, script):
        return self.page.evaluate(script)

    def text(self, selector):
        return self.page.inner_text(selector)

    def state(self):
        return dict(part.split("=") for part in self.page.evaluate("location.hash.slice(1)").split("&") if part)

    def fresh(self):
        """The page as if just opened."""
        self.page.set_viewport_size({"width": 1280, "height": 900})
        self.page.fill("#search", "")
        self.page.evaluate("document.activeElement.blur(); localStorage.clear()")
        for theme in ("dark", "light"):  # a change is what makes the page look anew
            self.page.emulate_media(color_scheme=theme)
        self.page.keyboard.press("0")
        self.page.evaluate("location.hash = '#view=verdict'")
        self.page.wait_for_function("document.getElementById('panel').hidden && !location.hash.includes('step')")
        return self

    def close(self):
        self.context.close()
        assert self.errors == []
        assert self.requests == []


@pytest.fixture
def opened(browser, tmp_path):
    """`opened(data, compare=…, width=…, theme=…, address=…)`; at the end, no error and no request."""
    pages = []

    def open_page(data, *, compare=None, **how):
        file = tmp_path / f"report-{len(pages)}.html"
        file.write_text(render(data, compare=compare), encoding="utf-8")
        pages.append(Opened(browser, file, **how))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close()


@pytest.fixture(scope="module")
def keep_open(browser, tmp_path_factory):
    """`keep_open(data)`: a page for several tests, since a browser needs a second for each."""
    pages = {}

    def open_page(data):
        if id(data) not in pages:
            file = tmp_path_factory.mktemp("page") / "report.html"
            file.write_text(render(data), encoding="utf-8")
            pages[id(data)] = Opened(browser, file)
        return pages[id(data)].fresh()

    yield open_page
    for page in pages.values():
        page.close()


@pytest.fixture
def sick_page(keep_open, sick):
    return keep_open(sick)


@pytest.fixture
def tried_page(keep_open, tried):
    return keep_open(tried)


# ---- what is drawn --------------------------------------------------------------------------------------------------

ALWAYS = {"loss", "signal", "depth", "updates", "gradients", "rate", "overhead"}


def test_a_healthy_run(opened, healthy):
    """A sound training has its verdict in words and every chart that its readings allow."""
    page = opened(healthy)
    page.draw_all()

    assert page.text(".headline").startswith("✓") and "ealthy" in page.text(".headline")
    assert ALWAYS | {"dead"} <= set(page.drawn())
    assert "No layer with a bounded activation" in page.text("#activations")
    assert page.text("#state") == "finished"


def test_a_sick_run_names_cause_layer_step_and_numbers(sick_page, sick):
    """The first cause stands on top with step, layer, number against limit, and code."""
    page = sick_page
    page.draw_all()
    cause = sick["verdict"]["causes"][0]

    assert cause["name"] == page.text(".cause h3")
    assert f"step {cause['first_step']}" in page.text(".cause header")
    assert cause["message"] in page.text(".cause")
    assert "Limit" in page.text(".cause .evidence")
    assert cause["name"] in page.page.inner_text("#plot-loss")
    page.page.click("#chart-signal summary")
    assert sick["explain"]["signal_norm"]["meaning"] in page.text("#chart-signal .about")
    assert ALWAYS | {"saturation", "dead", "clip"} <= set(page.drawn())


def test_nan_at_step_zero(opened, nan_at_once):
    """A run that was never finite is marked so in every chart instead of an empty one."""
    page = opened(nan_at_once)
    page.draw_all()

    assert "never finite" in page.text(".glance")
    assert "not finite" in page.page.get_attribute("#plot-loss", "aria-label")
    assert "NaN or Inf" in page.text("#signal figcaption")
    assert {"loss", "signal", "gradients"} <= set(page.drawn())


def test_one_nan_among_finite_steps(opened, folder):
    """A single reading that is not finite has its mark, and its cell in the heatmap."""
    page = opened(read_page(record(folder, bad_step=7), {}))
    page.draw_all()

    assert "1 reading not finite" in page.page.get_attribute("#plot-loss", "aria-label")
    assert "1 cell not finite" in page.page.get_attribute("#plot-signal", "aria-label")


@pytest.mark.parametrize(("depth", "steps"), [(1, 30), (8, 1)])
def test_one_of_a_kind(opened, folder, depth, steps):
    """One step or one layer is drawn as the point or row that it is."""
    page = opened(read_page(record(folder, depth=depth, steps=steps), {}))
    page.draw_all()

    assert ALWAYS <= set(page.drawn())
    # A line of one point has no length: it needs a marker.
    points = "[...document.querySelectorAll('#plot-loss .scatterlayer .point')].length"
    assert page.count(points) >= (1 if steps == 1 else 0)


def test_a_run_without_a_step(opened, folder):
    """A run of which nothing was read says so."""
    page = opened(read_page(record(folder, steps=0), {}))
    page.draw_all()

    assert page.drawn() == []
    assert "No loss" in page.text("#loss") or "no" in page.text("#loss").lower()


def test_a_thousand_layers(opened, folder):
    """The heatmap of a thousand layers is drawn within seconds, and a key moves on at once."""
    page = opened(read_page(record(folder, depth=1000, steps=40, decades=0.001), {}), address="#view=signal")
    page.page.wait_for_selector("#plot-signal .heatmaplayer image")
    slowest = page.page.evaluate(
        "() => { let worst = 0; for (let i = 0; i < 5; i++) { const began = performance.now();"
        "dispatchEvent(new KeyboardEvent('keydown', {key: 'j'})); worst = Math.max(worst, performance.now() - began); }"
        "return worst; }"
    )

    assert slowest < 2000
    assert page.state()["layer"] == "net.4"
    assert page.count("document.querySelectorAll('#layers tbody tr').length") == 200
    page.page.click("text=Show all 1000")
    assert page.count("document.querySelectorAll('#layers tbody tr').length") == 1000


def test_two_subjects(opened, two_subjects):
    """Two models are two subjects; the charts follow the choice, and the address keeps it."""
    page = opened(two_subjects)
    page.page.click("#subjects >> text=critic")

    assert page.state()["subject"] == "critic"
    assert page.page.get_attribute("#subjects >> text=critic", "aria-pressed") == "true"
    page.draw_all()
    assert {"loss", "signal", "saturation"} <= set(page.drawn())
    assert "Tanh" in page.text("#layers")


def test_gaps_break_the_line(opened, folder):
    """Steps that were not recorded are a gap, not a straight line."""
    page = opened(read_page(record(folder, gap=range(40, 70)), {}))

    assert page.count("document.querySelectorAll('#plot-loss .scatterlayer .js-line').length") == 2


def test_a_damaged_file_shows_the_rest(opened, damaged):
    """What is left of a damaged file is drawn, below the sentence that says so."""
    assert damaged["run"]["damage"]
    page = opened(damaged)
    page.draw_all()

    assert damaged["run"]["damage"] in page.text("#verdict .notice")
    assert "loss" in page.drawn()


def test_treatments_that_were_tried(tried_page):
    """What `isograd fix` measured: outcomes, effects with intervals, and paired curves of the chosen one."""
    page = tried_page
    page.draw_all()

    assert "0.9 [0.8, 1]" in page.text("#treatments table")
    assert "a + b" in page.text("#treatments table")
    assert {"effects", "curves"} <= set(page.drawn())
    page.page.click("#treatments >> text=a + b")
    assert "No loss curves were kept" in page.text("#treatments")


def test_comparing_two_runs(opened, sick, healthy):
    """A second run lies dashed over the first: two verdicts, two heatmaps, two lines."""
    page = opened(healthy, compare=sick)
    page.draw_all()

    assert page.count("document.querySelectorAll('.headline').length") == 2
    assert {"signal", "signal-b", "loss", "depth"} <= set(page.drawn())
    assert "stroke-dasharray" in page.page.inner_html("#plot-loss .scatterlayer")


# ---- what can be done with it ---------------------------------------------------------------------------------------


def test_keyboard(sick_page):
    """j, k, /, ?, t, [, ] and Esc do what the list says, and not while a field takes letters."""
    page = sick_page
    keyboard = page.page.keyboard

    keyboard.press("j")
    assert page.state()["layer"] == "net.0"
    keyboard.press("j")
    keyboard.press("j")
    keyboard.press("k")
    assert page.state()["layer"] == "net.1"
    assert "net.1" in page.text("#panel-heading")
    keyboard.press("Escape")
    assert "layer" not in page.state()
    assert not page.page.is_visible("#panel")

    keyboard.press("[")
    assert int(page.state()["step"]) < 119
    keyboard.press("/")
    keyboard.type("net.3 jt")
    assert page.page.input_value("#search") == "net.3 jt"
    assert "layer" not in page.state()
    keyboard.press("Escape")

    theme = page.page.get_attribute("html", "data-theme")
    keyboard.press("t")
    assert page.page.get_attribute("html", "data-theme") != theme
    keyboard.press("?")
    assert page.page.is_visible("#keys")
    keyboard.press("Escape")
    assert not page.page.is_visible("#keys")


def test_saving_a_chart(sick_page):
    """A chart is saved as a PNG picture, twice as large as on the screen, without a network."""
    sick_page.draw_all()
    with sick_page.page.expect_download() as download:
        sick_page.page.focus("#chart-loss .save")
        sick_page.page.keyboard.press("Enter")

    assert download.value.suggested_filename == "isograd-loss.png"
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_search(sick_page):
    """The search narrows the table of layers."""
    page = sick_page
    page.page.fill("#search", "net.5")

    assert page.count("document.querySelectorAll('#layers tbody tr').length") == 1
    page.page.fill("#search", "nothing")
    assert "No layer is called so" in page.text("#layers")


def test_deep_link(opened, sick):
    """An address opens its layer, step and section; one that names nothing of this run opens the run."""
    page = opened(sick, address="#layer=net.2&step=40&view=depth")

    assert "net.2" in page.text("#panel-heading")
    assert page.text("#depth output") == "step 40"
    assert abs(page.count("document.getElementById('depth').getBoundingClientRect().top")) < 200
    page.page.evaluate("location.hash = '#layer=gone&step=x'")
    page.page.wait_for_function("document.getElementById('panel').hidden")


def test_clicking_a_heatmap_row(sick_page):
    """A click on a cell opens its layer and holds its step; the slider then moves the step."""
    page = sick_page
    page.page.evaluate("location.hash = '#view=signal'")
    page.page.wait_for_selector("#plot-signal .heatmaplayer image")
    page.page.locator("#plot-signal").scroll_into_view_if_needed()
    box = page.page.locator("#plot-signal .heatmaplayer image").first.bounding_box()
    page.page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] * 2.5 / 8)
    assert "net.2" in page.text("#tip") and "loss / activation" in page.text("#tip")
    assert page.count("document.querySelectorAll('.cursor:not([hidden])').length") >= 1
    page.page.mouse.down()
    page.page.mouse.up()

    assert page.state()["layer"] == "net.2"
    assert 50 < int(page.state()["step"]) < 70
    page.page.locator("#step").press("ArrowLeft")
    assert 50 < int(page.state()["step"]) < 70


def test_zoom_is_shared(sick_page):
    """A stretch dragged in one chart is the stretch of all charts over time; 0 gives the whole run back."""
    page = sick_page
    page.draw_all()
    page.page.locator("#plot-loss").scroll_into_view_if_needed()
    box = page.page.locator("#plot-loss .nsewdrag").first.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.page.mouse.move(box["x"] + box["width"] * 0.25, middle)
    page.page.mouse.down()
    page.page.mouse.move(box["x"] + box["width"] * 0.5, middle, steps=4)
    page.page.mouse.up()
    ranges = (
        "['loss', 'signal', 'gradients']"
        ".map(id => document.getElementById('plot-' + id).layout.xaxis.range.map(Math.round))"
    )
    page.page.wait_for_selector("#zoom:not([hidden])")
    page.draw_all()
    loss, signal, gradients = page.count(ranges)

    assert loss == signal == gradients
    assert 25 <= loss[0] <= 35 and 55 <= loss[1] <= 65
    page.page.keyboard.press("0")
    assert page.page.is_hidden("#zoom")


def test_copy_buttons(sick_page):
    """Each block of code is copied as it stands."""
    page = sick_page
    page.page.click("#verdict .code button >> nth=0")
    page.page.wait_for_selector("text=Copied")

    copied = page.page.evaluate("navigator.clipboard.readText()")
    assert copied == page.page.locator("#verdict .code code").first.text_content()


def test_theme_follows_the_system_and_the_switch(sick_page):
    """The system's choice is the first; the button's is kept."""
    page = sick_page.page
    assert page.get_attribute("html", "data-theme") == "light"
    page.emulate_media(color_scheme="dark")
    assert page.get_attribute("html", "data-theme") == "dark"

    page.click("#theme")
    page.reload()
    page.wait_for_selector("html[data-ready]")
    assert page.get_attribute("html", "data-theme") == "light"


def test_no_horizontal_scrolling(tried_page):
    """From a phone to a large screen the page is as wide as the window, with the panel of a layer open too."""
    page = tried_page
    page.draw_all()
    for width in (360, 768, 1280, 2560):
        page.page.set_viewport_size({"width": width, "height": 900})
        page.page.wait_for_timeout(300)
        assert page.count("document.documentElement.scrollWidth") <= width
        page.page.keyboard.press("j")
        page.page.wait_for_timeout(300)
        assert page.count("document.documentElement.scrollWidth") <= width
        page.page.keyboard.press("Escape")


def test_printing_draws_everything(opened, sick, tmp_path):
    """A printed page has the charts that were never scrolled to."""
    page = opened(sick)
    page.page.pdf(path=tmp_path / "report.pdf")

    assert ALWAYS <= set(page.drawn())


# ---- safe and open to everyone --------------------------------------------------------------------------------------


def test_names_are_never_html(opened, folder):
    """Layers, scripts and events called like tags are shown as they are called and run nothing."""
    data = read_page(record(folder, name=EVIL + "{}", script=f"</script>{EVIL}.py"), {})
    subject = data["subjects"][0]
    event = {"step": 3, "kind": EVIL, "layer": f"{EVIL}0", "text": f"</script>{EVIL}<!--", "level": "error"}
    subject["events"] = [event]
    data["treatments"] = [{"name": EVIL, "cause": EVIL, "code": f"{EVIL}\n</pre>", "applicability": "automatic"}]
    data["run"]["versions"] = {f"{EVIL}": EVIL}
    page = opened(data, address="#layer=%3Cscript%3Ealert(1)%3C%2Fscript%3E2")
    page.draw_all()

    assert page.text("h1") == f"</script>{EVIL}.py"
    assert page.text("#panel-heading") == f"{EVIL}2"
    assert EVIL in page.text("#events")
    assert "<script>" in page.page.inner_text("#plot-signal")
    scripts = "[...document.scripts].filter(s => s.textContent.includes('alert(1)') && s.type !== 'application/json')"
    assert page.count(f"{scripts}.length") == 0


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility(tried_page, theme):
    """axe finds nothing serious: contrast, names, landmarks, order of headings, focus."""
    page = tried_page
    page.page.emulate_media(color_scheme=theme)
    page.draw_all()
    page.page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    page.page.keyboard.press("j")
    found = Axe().run(page.page).response["violations"]
    grave = [
        (v["id"], v["impact"], [node["html"][:160] for node in v["nodes"][:3]])
        for v in found
        if v["impact"] in ("serious", "critical")
    ]

    assert grave == []


def test_charts_are_told_in_words(sick_page):
    """Each chart has a text that says its numbers."""
    page = sick_page
    words = page.page.eval_on_selector_all(
        "main figure:not([hidden]) .plot", "all => all.map(e => [e.getAttribute('role'), e.getAttribute('aria-label')])"
    )

    assert {role for role, _ in words} == {"img"}
    assert all(any(c.isdigit() for c in label) for _, label in words)
    assert "2.3 loss at step 0" in page.page.get_attribute("#plot-loss", "aria-label")


def test_without_javascript(browser, sick, tmp_path):
    """The verdict can be read where scripts are switched off."""
    file = tmp_path / "report.html"
    file.write_text(render(sick), encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"file://{file}")

    assert sick["verdict"]["headline"] in page.inner_text("noscript")
    context.close()


# ---- the file -------------------------------------------------------------------------------------------------------


def test_the_data_leave_no_way_out(healthy):
    """In the block of data no character stands that HTML knows, and it is the data that went in."""
    data = {**healthy, "run": {**healthy["run"], "script": "</script><!-- & \u2028 \ud800"}}
    page = render(data)
    block = page.partition('id="data">')[2].partition("</script>")[0]

    assert not set("<>&\u2028") & set(block)
    assert json.loads(block) == data
    page.encode()


def test_a_page_stands_alone(sick):
    """One file: no address outside, and plotly inside."""
    page = render(sick)

    assert "default-src 'none'" in page
    assert 'src="' not in page.partition("</head>")[0]
    assert page.count("<script") - page.count("&lt;script") >= 4
    assert "plotly.js v" in page


def test_a_live_page_has_no_inline_script():
    """A live page loads everything, so that the server can forbid inline scripts."""
    page = render(None, live="api/runs/a&b", compare="api/runs/c", root="/x/")

    assert 'data-live="/x/api/runs/a&amp;b"' in page
    assert 'data-compare="/x/api/runs/c"' in page
    assert '<script src="/x/static/page.js">' in page
    assert "<script>" not in page
    assert len(page) < 20_000


def test_assets():
    """The three assets are there, and nothing else can be asked for."""
    assert all(len(asset(name)) > 1000 for name in ASSETS)
    with pytest.raises(KeyError):
        asset("../_page.py")


def test_data_or_a_place():
    """A page has data or a server."""
    with pytest.raises(ValueError, match="either"):
        render()
