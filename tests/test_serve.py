"""The live server: who may ask, what is answered, and that it follows a training which goes on, dies or comes back."""

import contextlib
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from hypothesis import given, settings
from hypothesis import strategies as st

from isograd._cli import main
from isograd._errors import IsogradError
from isograd._history import Layer, Parameter
from isograd._live import Live, Tail, _spaced, _timed
from isograd._record import RunFile
from isograd._runs import read_run
from isograd._serve import PORT, app, bind

TOKEN = "a-token-for_tests~0.1"
SLACK = 5.0  # seconds that what is promised within two may take on a machine with other work


# ---- runs, a server, and a client that changes nothing of what it sends ---------------------------------------------


def record(root, *, steps=50, script="train.py", close=True, kept=10_000, layers=4, **meta):
    """A run written by hand; its file, still open where `close` is False."""
    names = [f"net.{i}" for i in range(layers)]
    file = RunFile.create(root, meta={"script": script, **meta}, kept=kept)
    file.add_layers("model", [Layer(name=name, kind="linear", position=i) for i, name in enumerate(names)])
    file.add_parameters("model", [Parameter(name=f"{name}.weight", layer=name, shape=(8, 8)) for name in names])
    for step in range(steps):
        write(file, step, layers=layers)
    if close:
        file.set_meta(state="finished", steps=steps)
        file.close()
    return file


def write(file, step, *, loss=None, layers=4):
    readings = {"loss": 2.3 * 0.99**step if loss is None else loss, "learning_rate": [0.1, 0.2]}
    file.write_row("model", step, "cheap", {**readings, "grad_norm": np.full(layers, 0.1 + step)})
    file.write_row("model", step, "deep", {"signal_norm": np.full(layers, 0.5)})


class Served:
    """`isograd serve` as a process of its own."""

    def __init__(self, root, *arguments, port=0):
        self.root = root
        command = [sys.executable, "-m", "isograd", "serve", "--port", str(port), "--token", TOKEN, *arguments]
        environment = {**os.environ, "ISOGRAD_OUT": str(root), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(root).parent
        )
        self.said = self.process.stdout.readline()
        assert "http://" in self.said, self.process.communicate()
        self.url = re.search(r"http://\S+", self.said).group()
        self.port = urlsplit(self.url).port
        self.origin = f"http://127.0.0.1:{self.port}"

    def end(self):
        """(status, seconds that it took, what is on stderr) after Ctrl-C."""
        start = time.monotonic()
        self.process.send_signal(signal.SIGINT)
        try:
            _, err = self.process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, err = self.process.communicate()
        return self.process.returncode, time.monotonic() - start, err

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            status, _, err = self.end()
            assert (0, "") == (status, err)


def ask(server, target, *, token=TOKEN, method="GET", **headers):
    """(status, headers, body) of one request, sent as it stands: no dot is taken out, nothing is quoted."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    with contextlib.closing(connection):
        if token is not None:
            headers["Cookie"] = f"isograd-{server.port}={token}"
        connection.putrequest(method, target, skip_host="Host" in headers, skip_accept_encoding=True)
        for name, value in headers.items():
            connection.putheader(name.replace("_", "-"), value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()


def asked(server, target, **headers):
    """The JSON of an answer that must be one."""
    status, _, body = ask(server, target, **headers)
    assert 200 == status, body
    return json.loads(body)


class Events:
    """A stream of server-sent events, read as they come: `seen` has (kind, data, when)."""

    def __init__(self, server, run):
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=30)
        request = f"GET /api/runs/{quote(run)}/events?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n\r\n"
        self.socket.sendall(request.encode())
        self.seen = []
        self.is_over = False
        self._left = b""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.socket.close()

    def wait(self, condition, seconds=SLACK):
        """The first event for which `condition(kind, data)` holds, among those seen and those to come."""
        end = time.monotonic() + seconds
        told = 0
        while True:
            for kind, data, when in self.seen[told:]:
                if condition(kind, data):
                    return kind, data, when
            told = len(self.seen)
            left = end - time.monotonic()
            assert left > 0 and not self.is_over, f"not within {seconds} s, after {self.seen[-3:]}"
            self.read(left)

    def read(self, seconds):
        if not select.select([self.socket], [], [], seconds)[0]:
            return
        received = self.socket.recv(1 << 20)
        self.is_over = not received or received.endswith(b"0\r\n\r\n")
        *events, self._left = (self._left + received).split(b"\n\n")
        for event in events:
            kind, data = re.search(rb"event: (\w+)", event), re.search(rb"data: (.*)", event)
            if kind and data:
                self.seen.append((kind[1].decode(), json.loads(data[1]), time.time()))

    def readings(self, statistic, subject="model"):
        """step -> (value, when it came)."""
        return {
            step: (value, when)
            for kind, data, when in self.seen
            if kind == "tail"
            for step, value in zip(*data["subjects"][subject]["lines"][statistic].values(), strict=True)
        }


TRAINING = textwrap.dedent("""
    import sys, time
    import torch
    from torch import nn
    import isograd

    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(32, 8)
    with isograd.watch(model, optimizer, out=sys.argv[1]):
        for step in range(100_000):
            loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(step, time.time(), flush=True)
            time.sleep(0.04)
""")


class Training:
    """A process that trains and is watched; `steps` has when each step ended."""

    def __init__(self, root):
        script = root.parent / "train_live.py"
        script.write_text(TRAINING, encoding="utf-8")
        before = set(root.iterdir())
        self.process = subprocess.Popen([sys.executable, script, root], stdout=subprocess.PIPE, text=True)
        self.steps = {}
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()
        while not self.steps:
            assert self.process.poll() is None
            time.sleep(0.05)
        self.id = (set(root.iterdir()) - before).pop().name

    def _listen(self):
        for line in self.process.stdout:
            if not line.endswith("\n"):
                break  # it was killed while it wrote
            step, when = line.split()
            self.steps[int(step)] = float(when)

    def kill(self):
        self.process.kill()
        self.process.wait()
        self._listener.join()
        self.process.stdout.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("served") / "runs"


@pytest.fixture(scope="module")
def finished(root):
    return record(root).id


@pytest.fixture(scope="module")
def server(root, finished):
    """A server that most tests share."""
    with Served(root) as served:
        yield served


@pytest.fixture(scope="module")
def training(root, server):
    """A training that goes on for as long as tests need it."""
    with Training(root) as process:
        yield process


# ---- who may ask ----------------------------------------------------------------------------------------------------

ROUTES = {
    "/": "/",
    "/runs/{run}": "/runs/RUN",
    "/compare": "/compare?a=RUN&b=RUN",
    "/static/{name}": "/static/page.css",
    "/api/runs": "/api/runs",
    "/api/runs/{run}/data": "/api/runs/RUN/data",
    "/api/runs/{run}/detail": "/api/runs/RUN/detail?first=0&last=9",
    "/api/runs/{run}/events": "/api/runs/RUN/events",
}


def test_routes_are_all_looked_at(tmp_path):
    """The table above is the application's."""
    gate = app(Live(tmp_path, {}), token=TOKEN, hosts=None, cookie="c")

    assert set(ROUTES) == {route.path for route in gate._inner.routes}


@pytest.mark.parametrize("target", [*ROUTES.values(), "/nowhere", "/static/page.js?token="])
@pytest.mark.parametrize("token", [None, "", "wrong", TOKEN[:-1], TOKEN + "x"])
def test_nothing_without_the_token(server, finished, target, token):
    """A request without it learns nothing, not even what there is."""
    status, headers, body = ask(server, target.replace("RUN", finished), token=token)

    assert 403 == status
    assert b"Open the address" in body
    assert "set-cookie" not in headers


@pytest.mark.parametrize("target", [t for t in ROUTES.values() if "events" not in t])
def test_token_opens_every_route(server, finished, target):
    """In the address or as the cookie that the address has left."""
    target = target.replace("RUN", finished)
    status, headers, _ = ask(server, f"{target}{'&' if '?' in target else '?'}token={TOKEN}", token=None)

    assert 200 == status
    assert f"isograd-{server.port}={TOKEN}; Path=/; HttpOnly; SameSite=Strict" == headers["set-cookie"]

    status, headers, _ = ask(server, target)

    assert 200 == status
    assert "set-cookie" not in headers


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "", "[::2]:80"])
def test_foreign_names_are_refused(server, host):
    """A name that was made to lead here gets no answer, whatever it brings, and no cookie."""
    status, headers, _ = ask(server, f"/?token={TOKEN}", Host=host)

    assert 421 == status
    assert "set-cookie" not in headers


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:9", "127.0.0.1:1234", "[::1]:80"])
def test_names_of_this_machine_are_not(server, host):
    """At any port: a tunnel has its own."""
    assert 200 == ask(server, "/", Host=host)[0]


@pytest.mark.parametrize(
    "target", ["/", "/runs/RUN", "/static/plotly.min.js", "/api/runs/RUN/data", "/nowhere", "/api/runs/nobody/data"]
)
@pytest.mark.parametrize("token", [None, TOKEN])
def test_headers_of_every_answer(server, finished, target, token):
    """No other origin may read, embed or frame it, and nothing foreign runs in it."""
    headers = ask(server, target.replace("RUN", finished), token=token)[1]

    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert {"default-src": "'none'", "script-src": "'self'", "frame-ancestors": "'none'"}.items() <= policy.items()
    assert "nosniff" == headers["x-content-type-options"]
    assert "no-referrer" == headers["referrer-policy"]
    assert "same-origin" == headers["cross-origin-resource-policy"]
    assert not any(name.startswith("access-control") for name in headers)


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_it_can_only_be_read(server, finished, method):
    """There is nothing that a request could change."""
    assert 405 == ask(server, f"/api/runs/{finished}/data", method=method)[0]


# ---- names are looked up, never followed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../runs/{id}",
        "..%2f..%2f..%2fetc",
        "%2e%2e",
        "%2e%2e%2fruns%2f{id}",
        "%2fetc%2fpasswd",
        "/etc/passwd",
        "{id}%00",
        "{id}/",
        "{id}%2f",
        "{id}%2frun.db",
        "./{id}",
        ".%2f{id}",
        "%5c..%5c{id}",
        "{id}%20",
        "",
        "%00",
        "%ff%fe",
        "link",
        "inner",
    ],
)
@pytest.mark.parametrize("route", ["/runs/{}", "/api/runs/{}/data", "/api/runs/{}/detail?first=0&last=1", "/static/{}"])
def test_no_name_leads_out_of_the_folder(server, root, finished, name, route):
    """What is not the id of a run in the list is not there, be it a path that exists."""
    outside = root.parent / "outside"
    if not outside.exists():
        shutil.copytree(root / finished, outside)
        (root / "link").symlink_to(outside, target_is_directory=True)
        (root / "inner").mkdir()
        (root / "inner" / "run.db").symlink_to(outside / "run.db")

    status, _, body = ask(server, route.format(name.format(id=finished)))

    assert 404 == status
    assert b"root:" not in body


def test_links_out_of_the_folder_are_not_listed(server, root, finished):
    """Nor is a folder without a run."""
    (root / "empty").mkdir(exist_ok=True)

    assert {"link", "inner", "empty"}.isdisjoint(run["id"] for run in asked(server, "/api/runs"))


@pytest.mark.parametrize("name", ['<img src=x onerror="alert(1)">', "a b#c?d&e=f%2e", "übung-学"])
def test_odd_names_are_served_and_spell_no_html(server, root, finished, name):
    """A folder may be called anything: its page holds the name only in a form that is no HTML."""
    shutil.copytree(root / finished, root / name)
    try:
        status, _, page = ask(server, f"/runs/{quote(name, safe='')}")
        data = asked(server, f"/api/runs/{quote(name, safe='')}/data")

        assert 200 == status
        assert b"<img" not in page
        assert f"api/runs/{quote(name, safe='')}".encode() in page
        assert name == data["run"]["id"]
        assert name in [run["id"] for run in asked(server, "/api/runs")]
    finally:
        shutil.rmtree(root / name)


# ---- what is answered -----------------------------------------------------------------------------------------------


def test_list_tells_what_ls_tells(server, root, finished):
    """The same facts, and nothing new while nothing changes."""
    _, headers, body = ask(server, "/api/runs")
    run = next(run for run in json.loads(body) if run["id"] == finished)

    assert {"id": finished, "state": "finished", "steps": 50, "script": "train.py", "subjects": ["model"]}.items() <= (
        run.items()
    )
    assert (304, b"") == ask(server, "/api/runs", If_None_Match=headers["etag"])[::2]


def test_data_is_fetched_once(server, finished):
    """The second time it has not changed; a weak tag, as proxies make it, is the same one."""
    status, headers, body = ask(server, f"/api/runs/{finished}/data")

    assert 200 == status
    assert finished == json.loads(body)["run"]["id"]
    assert 50 == json.loads(body)["run"]["steps"]
    for tag in (headers["etag"], f'"other", W/{headers["etag"]}'):
        assert (304, b"") == ask(server, f"/api/runs/{finished}/data", If_None_Match=tag)[::2]
    assert 200 == ask(server, f"/api/runs/{finished}/data", If_None_Match='"other"')[0]


@pytest.mark.parametrize("name", ["page.css", "page.js", "plotly.min.js", "runs.js"])
def test_assets_are_fetched_once(server, name):
    """With a type that a browser accepts despite `nosniff`."""
    status, headers, body = ask(server, f"/static/{name}")

    assert 200 == status and body
    assert headers["content-type"].startswith("text/css" if name.endswith("css") else "text/javascript")
    assert 304 == ask(server, f"/static/{name}", If_None_Match=headers["etag"])[0]


def test_detail_holds_the_steps_asked_for(server, finished):
    """Lines and maps of a range, in no more columns than asked for."""
    (subject,) = asked(server, f"/api/runs/{finished}/detail?first=10&last=29&columns=5")["subjects"]

    assert 10 == subject["lines"]["loss"]["first"][0]
    assert 29 == subject["lines"]["loss"]["last"][-1]
    assert 5 >= len(subject["lines"]["loss"]["mid"])
    assert "signal_norm" in subject["maps"]


@pytest.mark.parametrize(
    "query",
    [
        "",
        "first=1",
        "first=9&last=1",
        "first=-1&last=9",
        "first=a&last=9",
        "first=1e3&last=9",
        "first=²&last=9",
        "first=0&last=9&columns=1",
        "first=0&last=9&columns=1000000",
        "first=0&last=99999999999999999999",
    ],
)
def test_detail_of_no_range_is_refused(server, finished, query):
    """With a sentence."""
    status, _, body = ask(server, f"/api/runs/{finished}/detail?{quote(query, safe='=&')}")

    assert 400 == status
    assert "must" in json.loads(body)["error"]


def test_run_that_starts_later_is_there_and_a_deleted_one_is_gone(server, root):
    """Without a restart of the server."""
    file = record(root, steps=3, close=False)
    file.flush()

    assert "running" == {run["id"]: run["state"] for run in asked(server, "/api/runs")}[file.id]
    assert 3 == asked(server, f"/api/runs/{file.id}/data")["run"]["steps"]

    file.close()
    shutil.rmtree(root / file.id)

    assert file.id not in [run["id"] for run in asked(server, "/api/runs")]
    for target in (f"/runs/{file.id}", f"/api/runs/{file.id}/data", f"/compare?a={file.id}&b={file.id}"):
        status, _, body = ask(server, target)
        assert (404, True) == (status, b"no such run" in body)


def test_damaged_run_shows_the_rest(server, root):
    """What can be read of a file that was cut short is served, with a sentence about the damage."""
    file = record(root, steps=400, layers=40)
    database = root / file.id / "run.db"
    os.truncate(database, database.stat().st_size // 2)

    run = asked(server, f"/api/runs/{file.id}/data")["run"]

    assert "damaged" in run["damage"]
    assert 0 < run["steps"] <= 400
    with Events(server, file.id) as events:
        events.wait(lambda kind, data: kind == "data")
    shutil.rmtree(root / file.id)


def test_file_that_is_no_run_yet_says_so(server, root):
    """And its page goes on when it has become one."""
    (root / "soon").mkdir()
    (root / "soon" / "run.db").touch()
    try:
        status, _, body = ask(server, "/api/runs/soon/data")

        assert 409 == status
        assert "is empty" in json.loads(body)["error"]
        with Events(server, "soon") as events:
            events.wait(lambda kind, data: (kind, data) == ("state", {"state": "unreadable"}))
            made = record(root.parent / "elsewhere", steps=5)
            (made.path / "run.db").replace(root / "soon" / "run.db")
            events.wait(lambda kind, data: (kind, data) == ("state", {"state": "finished"}))
            events.wait(lambda kind, data: kind == "data", 3 * SLACK)
        assert 5 == asked(server, "/api/runs/soon/data")["run"]["steps"]
    finally:
        shutil.rmtree(root / "soon")


def test_run_without_steps(server, root):
    """It is there, and says that it has none."""
    file = record(root, steps=0)

    assert 0 == asked(server, f"/api/runs/{file.id}/data")["run"]["steps"]
    shutil.rmtree(root / file.id)


# ---- following ------------------------------------------------------------------------------------------------------


def test_steps_arrive_while_they_are_made(server, training):
    """Two browsers hear every step, a third that does not read notwithstanding, within 2 s (5 s are allowed here)."""
    with Events(server, training.id) as one, Events(server, training.id) as two, Events(server, training.id):
        one.wait(lambda kind, data: (kind, data) == ("state", {"state": "running"}))
        start = max(training.steps) + 2
        end = start + 60
        for events in (one, two):
            events.wait(lambda kind, data: kind == "tail" and data["steps"] > end, 6 * SLACK)

        for events in (one, two):
            readings = events.readings("loss")
            assert set(range(start, end)) <= set(readings)
            assert all(value > 0 for value, _ in readings.values())
        # The second was read when the first had heard all.
        delays = [one.readings("loss")[step][1] - training.steps[step] for step in range(start, end)]
        print(f"tail: median {np.median(delays):.2f} s, slowest {max(delays):.2f} s")

        assert max(delays) < SLACK
        assert one.readings("learning_rate[0]")[start][0] == pytest.approx(0.05)
        loss, recorded = one.readings("loss"), read_run(server.root / training.id).histories[0]["loss"]
        assert [loss[step][0] for step in range(start, end)] == recorded.values[start:end].tolist()


def test_data_rests_while_a_run_goes_on(server, root):
    """What is announced is what is fetched; it stays for two seconds at least, and is new when the run has ended."""
    file = record(root, steps=5, close=False)
    file.flush()
    with Events(server, file.id) as events:
        _, told, _ = events.wait(lambda kind, data: kind == "data", 3 * SLACK)
        start = time.monotonic()
        _, headers, body = ask(server, f"/api/runs/{file.id}/data")
        write(file, 5)
        file.flush()

        assert told["etag"] == headers["etag"]
        assert ("running", 5) == tuple(json.loads(body)["run"][key] for key in ("state", "steps"))
        again = ask(server, f"/api/runs/{file.id}/data", If_None_Match=headers["etag"])
        assert 304 == again[0] or time.monotonic() - start > 0.5

        file.set_meta(state="finished")
        file.close()
        events.wait(lambda kind, data: kind == "data" and data != told)
        run = asked(server, f"/api/runs/{file.id}/data")["run"]
        assert ("finished", 6) == (run["state"], run["steps"])
    shutil.rmtree(root / file.id)


def test_computing_rests_longer_where_it_had_to_wait():
    """Twenty times as long as it took on a free core, 600 times its share of one that others want, and 2 s at least."""

    def work():
        end = time.thread_time() + 0.12
        while time.thread_time() < end:
            pass

    def held_up():
        work()
        time.sleep(0.5)  # as long as others have the core

    start = time.monotonic()
    _, free = _timed(work)
    took = time.monotonic() - start
    _, shared = _timed(held_up)

    assert free == pytest.approx(20 * took, rel=0.1) or took > 0.18
    assert shared == pytest.approx(600 * 0.12, rel=0.2)
    assert ("done", 2.0) == _timed(lambda: "done")


def test_killed_run_is_shown_as_stopped(root, server, finished):
    """Within 10 s after it died without a word, in its stream, in the list and in its data."""
    with Training(root) as process, Events(server, process.id) as events:
        events.wait(lambda kind, data: kind == "tail")
        process.kill()
        start = time.monotonic()
        events.wait(lambda kind, data: (kind, data) == ("state", {"state": "stopped"}), 10)
        print(f"stopped after {time.monotonic() - start:.2f} s")

        assert "stopped" == {run["id"]: run["state"] for run in asked(server, "/api/runs")}[process.id]
        etags = {data["etag"] for kind, data, _ in events.seen if kind == "data"}
        events.wait(lambda kind, data: kind == "data" and data["etag"] not in etags, 10)
        assert "stopped" == asked(server, f"/api/runs/{process.id}/data")["run"]["state"]


def test_deleted_run_ends_its_stream(server, root):
    """The page is told, and a reconnect finds nothing."""
    file = record(root, steps=3)
    with Events(server, file.id) as events:
        events.wait(lambda kind, data: (kind, data) == ("state", {"state": "finished"}))
        shutil.rmtree(root / file.id)
        events.wait(lambda kind, data: (kind, data) == ("state", {"state": "deleted"}))
        while not events.is_over:
            events.read(SLACK)

    assert 404 == ask(server, f"/api/runs/{file.id}/events")[0]


def test_server_does_nothing_when_nobody_looks(server, root, training):
    """A page that was closed costs nothing: no file is read from then on, though the training goes on."""

    def reads():
        return re.search(r"syscr: (\d+)", Path(f"/proc/{server.process.pid}/io").read_text(encoding="utf-8"))[1]

    with Events(server, training.id) as events:
        events.wait(lambda kind, data: kind == "tail")
    time.sleep(1)
    before = reads()
    time.sleep(1.5)

    assert before == reads()


def test_server_gives_way(server):
    """Its priority is below that of a training."""
    assert os.getpriority(os.PRIO_PROCESS, server.process.pid) > os.getpriority(os.PRIO_PROCESS, 0)


def test_finished_run_is_one_plain_file(server, root):
    """A page that is open does not keep the writer from clearing its journal away."""
    file = record(root, close=False)
    with Events(server, file.id) as events:
        events.wait(lambda kind, data: kind == "data", 3 * SLACK)
        file.set_meta(state="finished")
        file.close()
        events.wait(lambda kind, data: (kind, data) == ("state", {"state": "finished"}))

        assert ["run.db"] == [path.name for path in file.path.iterdir()]
    shutil.rmtree(root / file.id)


# ---- start and end --------------------------------------------------------------------------------------------------


def test_ctrl_c_ends_it_with_streams_open(tmp_path):
    """At once, with status 0 and without a word, though pages listen and one does not read what is sent."""
    file = record(tmp_path / "runs", close=False)
    file.flush()
    with Served(tmp_path / "runs") as server, contextlib.ExitStack() as stack:
        for _ in range(3):
            events = stack.enter_context(Events(server, file.id))
            events.wait(lambda kind, data: kind == "tail")
        stuck = stack.enter_context(contextlib.closing(socket.create_connection(("127.0.0.1", server.port))))
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.sendall(f"GET /static/plotly.min.js?token={TOKEN} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        time.sleep(0.5)

        status, seconds, err = server.end()

    file.close()
    assert (0, "") == (status, err)
    assert seconds < 2


def test_restart_on_the_same_port_goes_on(tmp_path):
    """Cookie and address stay good, and the same data has the same tag."""
    file = record(tmp_path / "runs")
    with Served(tmp_path / "runs") as server, Events(server, file.id) as events:
        events.wait(lambda kind, data: kind == "data", 3 * SLACK)
        tag = ask(server, f"/api/runs/{file.id}/data")[1]["etag"]
        server.end()
        with Served(tmp_path / "runs", port=server.port) as again:
            assert server.url == again.url
            assert 304 == ask(again, f"/api/runs/{file.id}/data", If_None_Match=tag)[0]


def test_address_opens_the_run(tmp_path):
    """Given by the beginning of its id or by its path, in whatever folder that is."""
    file = record(tmp_path / "runs", steps=2)
    elsewhere = record(tmp_path / "other", steps=2)
    for argument, run in ((file.id[:-2], file.id), (str(elsewhere.path / "run.db"), elsewhere.id)):
        with Served(tmp_path / "runs", argument) as server:
            assert f"/runs/{run}?token={TOKEN}" in server.url
            assert 200 == ask(server, server.url.removeprefix(server.origin), token=None)[0]
            assert [run] == [run["id"] for run in asked(server, "/api/runs")]


def test_token_is_random(tmp_path, monkeypatch):
    """Where none is given, and long."""
    monkeypatch.setenv("ISOGRAD_OUT", str(tmp_path))
    command = [sys.executable, "-m", "isograd", "serve"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    tokens = set()
    for process in processes:
        tokens.add(process.stdout.readline().partition("token=")[2].split()[0])
        process.send_signal(signal.SIGINT)  # as early as anybody can

        assert ("", "") == process.communicate()
        assert 0 == process.returncode

    assert 2 == len(tokens)
    assert all(len(token) >= 43 for token in tokens)  # 256 bits


def refused(capsys, *arguments):
    status = main(["serve", *map(str, arguments)])
    out, err = capsys.readouterr()

    assert (2, "", 1) == (status, out, err.count("\n"))
    return err


def test_what_cannot_be_served_is_one_sentence(capsys, tmp_path, monkeypatch):
    """A taken port, an address that is none or not ours, a run that is not there, a token that is no good."""
    monkeypatch.chdir(tmp_path)
    with bind("127.0.0.1", 0) as taken:
        assert "is taken" in refused(capsys, "--port", taken.getsockname()[1])
    assert "no address" in refused(capsys, "--host", "no such host")
    assert "cannot be listened on" in refused(capsys, "--host", "192.0.2.1")
    assert "no run in" in refused(capsys, "nobody")
    assert "--port" in refused(capsys, "--port", "70000")
    for token in ("short", "with space in it", "semi;colon-and-more"):
        assert "--token" in refused(capsys, "--token", token)


def test_taken_port_is_passed_over():
    """Without `--port` the next free one near the usual is taken."""
    with bind("127.0.0.1", None) as first, bind("127.0.0.1", None) as second:
        numbers = [listener.getsockname()[1] for listener in (first, second)]

    assert PORT <= numbers[0] < numbers[1] <= PORT + 25


def test_other_machines_get_a_warning(tmp_path):
    """A server that is reachable from elsewhere says what that means, and takes any name."""
    record(tmp_path / "runs", steps=2)
    with Served(tmp_path / "runs", "--host", "0.0.0.0") as server:
        assert "not encrypted" in server.process.stdout.readline()
        assert 200 == ask(server, "/", Host="box.example")[0]
        assert 403 == ask(server, "/", Host="box.example", token=None)[0]


def test_bind_says_what_is_wrong():
    """With the system's own reason."""
    with pytest.raises(IsogradError, match="cannot be listened on"):
        bind("192.0.2.1", None)


# ---- the newest readings --------------------------------------------------------------------------------------------


@settings(max_examples=15)
@given(flushes=st.lists(st.integers(1, 60), min_size=1, max_size=8), kept=st.sampled_from([220, 10_000]))
def test_tail_gives_every_reading_once(tmp_path_factory, flushes, kept):
    """However the steps are spread over looks, and though old rows are merged meanwhile."""
    file = record(tmp_path_factory.mktemp("tail"), steps=0, close=False, kept=kept)
    tail = Tail(file.path)
    losses = np.random.default_rng(0).normal(size=sum(flushes))
    losses[::7] = np.nan
    losses[::11] = np.inf
    seen = []
    step = 0
    for count in flushes:
        for _ in range(count):
            write(file, step, loss=losses[step])
            step += 1
        file.flush()
        news = tail.look()
        line = news.lines["model"]["loss"]
        seen += list(zip(line["steps"], line["values"], strict=True))

        assert ("running", step) == news[:2]
        assert {} == tail.look().lines
    file.close()

    assert [(i, loss if np.isfinite(loss) else None) for i, loss in enumerate(losses.tolist())] == seen


def test_tail_of_a_fast_run_is_thinned(tmp_path):
    """It never grows beyond what a page can draw, and ends with the newest step."""
    file = record(tmp_path, steps=3000)

    line = Tail(file.path).look().lines["model"]["loss"]

    assert 200 == len(line["steps"]) == len(set(line["steps"]))
    assert 2999 == line["steps"][-1]


@given(st.integers(0, 5000))
def test_spaced_indices(count):
    """At most 200, increasing, the last one among them."""
    indices = _spaced(count)

    assert len(indices) == min(count, 200)
    assert indices == sorted(set(indices))
    assert indices[-1:] == ([count - 1] if count else [])


def test_tail_begins_anew_with_another_file(tmp_path):
    """A run that was deleted and made again is another one."""
    file = record(tmp_path, steps=30)
    tail = Tail(file.path)
    assert 30 == tail.look().steps
    other = record(tmp_path / "other", steps=5)
    (other.path / "run.db").replace(file.path / "run.db")

    news = tail.look()

    assert (5, [0, 1, 2, 3, 4]) == (news.steps, news.lines["model"]["loss"]["steps"])

    shutil.rmtree(file.path)
    assert "deleted" == tail.look().state


# ---- in a browser ---------------------------------------------------------------------------------------------------


class Tab:
    """A page of a browser that keeps what went wrong in it: `errors`, and requests to anybody else: `foreign`."""

    def __init__(self, browser, address):
        self.context = browser.new_context(viewport={"width": 1280, "height": 900})
        self.page = self.context.new_page()
        self.errors, self.foreign = [], []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        # What a browser says by itself of a server that has gone for a while is no error of the page.
        self.page.on(
            "console",
            lambda said: said.type == "error" and "net::ERR_" not in said.text and self.errors.append(said.text),
        )
        self.page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        origin = "http://{0.hostname}:{0.port}/".format(urlsplit(address))
        self.page.on("request", lambda r: r.url.startswith((origin, "data:")) or self.foreign.append(r.url))
        self.page.goto(address)

    def __enter__(self):
        return self.page

    def __exit__(self, kind, *_):
        self.context.close()
        if kind is None:
            assert ([], []) == (self.errors, self.foreign)


def shows(page, state, seconds):
    """Wait until the page says that the run is `state`."""
    page.wait_for_function(
        "state => document.getElementById('state').textContent === state", arg=state, timeout=1000 * seconds
    )


def last_step(page):
    """The last step of the loss as it is drawn."""
    return page.evaluate(
        "Math.max(...document.querySelector('#loss .js-plotly-plot').data.flatMap(t => Array.from(t.x ?? [])))"
    )


def grows(page, beyond, seconds=2 * SLACK):
    """Wait until a step behind `beyond` is drawn."""
    end = time.monotonic() + seconds
    while last_step(page) <= beyond:
        assert time.monotonic() < end
        page.wait_for_timeout(200)


def test_page_lives_with_its_run(tmp_path, browser):
    """It draws steps as they come, outlives its server, and shows that the run died: without an error on the way."""
    root = tmp_path / "runs"
    root.mkdir()
    with Training(root) as process, contextlib.ExitStack() as stack:
        server = stack.enter_context(Served(root, process.id))
        with Tab(browser, server.url) as page:
            page.wait_for_selector("#loss .js-plotly-plot", timeout=30_000)
            shows(page, "live", SLACK)
            assert f"{server.origin}/runs/{process.id}" == page.url.partition("#")[0]  # the token is not in it
            grows(page, last_step(page))

            assert (0, "") == server.end()[::2]
            shows(page, "reconnecting…", SLACK)
            stack.enter_context(Served(root, process.id, port=server.port))
            shows(page, "live", 2 * SLACK)
            grows(page, last_step(page))

            process.kill()
            shows(page, "stopped", 10)


def test_list_lives(tmp_path, browser):
    """A run appears when it starts and disappears when it is deleted; two ticked ones are laid over each other."""
    root = tmp_path / "runs"
    with Served(root) as server, Tab(browser, server.url) as page:
        assert f"{server.origin}/" == page.url
        page.get_by_text("No run has been recorded here yet").wait_for()
        first = record(root, steps=20)
        second = record(root, steps=30, close=False, script="<img src=x onerror=alert(1)>")
        odd = root / "<img src=x onerror=alert(1)>"
        shutil.copytree(first.path, odd)
        page.get_by_role("link", name=odd.name).wait_for()
        page.get_by_role("row").filter(has_text=second.id).get_by_text("running").wait_for()
        assert "3 runs, 1 running" == page.locator("#counted").text_content()

        page.get_by_label(f"Compare {first.id}").check()
        page.get_by_label(f"Compare {second.id}").check()
        second.set_meta(state="finished")
        second.close()
        page.get_by_role("row").filter(has_text=second.id).get_by_text("finished").wait_for()
        shutil.rmtree(odd)
        page.get_by_role("link", name=odd.name).wait_for(state="detached")
        assert page.get_by_label(f"Compare {first.id}").is_checked()

        page.get_by_label("Search runs").fill("nothing like it")
        page.get_by_text("No run has these words").wait_for()
        page.get_by_label("Search runs").fill(first.id[:12])
        page.get_by_role("button", name="Compare").click()
        page.wait_for_selector("#loss .js-plotly-plot", timeout=30_000)
        assert f"{server.origin}/compare?a={first.id}&b={second.id}" == page.url.partition("#")[0]


def test_list_is_accessible(browser, server):
    """axe finds nothing serious, on a wide page and on a narrow one, which does not scroll sideways."""
    with Tab(browser, f"{server.origin}/?token={TOKEN}") as page:
        for width in (1280, 360):
            page.set_viewport_size({"width": width, "height": 800})
            page.get_by_role("link").nth(1).wait_for()
            found = Axe().run(page).response["violations"]

            assert [] == [one["id"] for one in found if one["impact"] in ("serious", "critical")]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
