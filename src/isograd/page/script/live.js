// A page that lives: data from the server, new readings as they come, and what is known of the connection.

/** A run on the server: {address, place, etag, source}. */
const feeds = [];

const STATES = { running: "live", finished: "finished", interrupted: "stopped", failed: "stopped", stopped: "stopped", unreadable: "stopped", deleted: "stopped" };

function follow(address, place) {
  const feed = { address, place, etag: null, source: null, state: null, fetching: false, again: false, timer: null };
  feeds.push(feed);
  listenTo(feed);
  return load(feed);
}

async function load(feed) {
  // One fetch at a time: what comes meanwhile is fetched after it, once.
  if (feed.fetching) { feed.again = true; return; }
  feed.fetching = true;
  try {
    const response = await fetch(`${feed.address}/data`);
    if (!response.ok) {
      const { error } = await response.json().catch(() => ({}));
      fail(error ?? `The server answered ${response.status}.`);
      if (response.status === 404) settleState(feed, "deleted");
      return;
    }
    const raw = await response.json();
    feed.etag = response.headers.get("ETag");
    fail("");
    take(feed.place, raw);
    settleState(feed, raw.run?.state ?? feed.state);
  } catch {
    reconnecting(feed);
  } finally {
    feed.fetching = false;
    if (feed.again) { feed.again = false; load(feed); }
  }
}

function listenTo(feed) {
  feed.source?.close();
  const source = new EventSource(`${feed.address}/events`);
  feed.source = source;
  source.addEventListener("open", () => settleState(feed, feed.state));
  source.addEventListener("state", (event) => settleState(feed, JSON.parse(event.data).state));
  source.addEventListener("tail", (event) => append(feed, JSON.parse(event.data)));
  source.addEventListener("data", (event) => { if (JSON.parse(event.data).etag !== feed.etag) load(feed); });
  source.addEventListener("error", () => {
    if (feed.state === "deleted") return source.close();
    reconnecting(feed);
    // A refused answer closes the source for good: then it is on us to try again.
    if (source.readyState === EventSource.CLOSED && !feed.timer) {
      feed.timer = setTimeout(() => {
        feed.timer = null;
        if (feed.source === source && !document.hidden) { listenTo(feed); load(feed); }
      }, 2000);
    }
  });
}

/** A tab that nobody sees costs the server nothing. */
function sleepOrWake() {
  for (const feed of feeds) {
    if (document.hidden) {
      feed.source?.close();
      feed.source = null;
    } else if (!feed.source && feed.state !== "deleted") {
      listenTo(feed);
      load(feed);
    }
  }
}

function settleState(feed, name) {
  if (!name) return;
  feed.state = name;
  if (feed.place === 0) showState(STATES[name] ?? "stopped", name === "running" ? "live" : name);
}

function reconnecting(feed) {
  if (feed.place === 0 && feed.state !== "deleted") showState("reconnecting", "reconnecting…");
}

function showState(kind, words) {
  const pill = byId("state");
  pill.hidden = false;
  if (pill.dataset.state === kind && pill.textContent === words) return;
  pill.dataset.state = kind;
  pill.textContent = words;
}

// ---- readings that come between two data sets ----

function append(feed, tail) {
  const dataset = runs[feed.place];
  if (!dataset) return;
  if (finite(tail.steps)) dataset.run = { ...dataset.run, steps: tail.steps };
  let grown = false;
  for (const [name, { lines }] of Object.entries(tail.subjects ?? {})) {
    const subject = dataset.subjects.find((each) => each.name === name);
    if (!subject) { load(feed); continue; } // one that was not there yet
    for (const [statistic, readings] of Object.entries(lines ?? {})) grown = grow(subject, statistic, readings) || grown;
  }
  if (tail.state) settleState(feed, tail.state);
  if (grown) soon();
}

/** A line with the readings behind its end. The server may repeat some after a reconnect: known steps are left out. */
function grow(subject, statistic, { steps, values }) {
  const line = subject.lines[statistic] ?? openedLine({ first: [], last: [], mid: [], nonfinite: [] });
  const end = line.last.length ? line.last[line.last.length - 1] : -Infinity;
  const fresh = steps.flatMap((step, i) => (step > end ? [[step, values[i] ?? NaN]] : []));
  if (!fresh.length) return false;
  const joined = (known, added) => Float64Array.from([...known, ...added]);
  const at_ = fresh.map(([step]) => step);
  const read = fresh.map(([, value]) => value);
  subject.lines[statistic] = {
    first: joined(line.first, at_), last: joined(line.last, at_), x: joined(line.x, at_), mid: joined(line.mid, read),
    low: line.low && joined(line.low, read), high: line.high && joined(line.high, read),
    // A tail tells a non-finite reading from a missing one only for the loss, which every step has.
    nonfinite: joined(line.nonfinite, read.map((value) => (statistic === "loss" && Number.isNaN(value) ? 1 : 0))),
  };
  return true;
}

/** Draw the lines that grew, those in sight, at most once a second: the browser sits on the machine that trains. */
let waiting = null;
function soon() {
  waiting ??= setTimeout(() => {
    waiting = null;
    onChange(new Set(["tail"]));
  }, 1000);
}

/** A new data set takes the place of the old one; what the user looks at stays. */
function take(place, raw) {
  runs[place] = opened(raw);
  if (place === 0 || runs[0]) { settle(); onChange(new Set(["data"])); }
  if (state.range) loadDetail();
}

// ---- zoomed in: the server has more than the columns of the whole run ----

let asked = 0;
async function loadDetail() {
  asked += 1;
  const mine = asked;
  for (const feed of feeds) runs[feed.place]?.subjects.forEach(forgetDetail);
  if (!state.range) return;
  const [first, last] = [Math.max(0, Math.floor(state.range[0])), Math.ceil(state.range[1])];
  for (const feed of feeds) {
    if (!runs[feed.place]?.subjects.some((subject) => isCoarse(subject, first, last))) continue;
    try {
      const response = await fetch(`${feed.address}/detail?first=${first}&last=${last}&columns=400`);
      if (!response.ok || mine !== asked) continue;
      const raw = await response.json();
      for (const part of raw.subjects ?? []) {
        const subject = runs[feed.place].subjects.find((each) => each.name === part.name);
        if (subject) useDetail(subject, part);
      }
      onChange(new Set(["data"]));
    } catch {
      // What is drawn stays: it is coarser, not wrong.
    }
  }
}

const isCoarse = (subject, first, last) => Object.values(subject.lines).some((line) =>
  line.first.some((step, i) => line.last[i] > step && line.last[i] >= first && step <= last));

function useDetail(subject, part) {
  subject.whole ??= { ...subject.lines };
  subject.detail = {}; // of maps: the depth profile, whose first and last are the run's, keeps the whole
  for (const [statistic, line] of Object.entries(part.lines ?? {})) if (subject.lines[statistic]) subject.lines[statistic] = spliced(subject.lines[statistic], openedLine(line));
  for (const [statistic, map] of Object.entries(part.maps ?? {})) {
    const stretch = openedMap(statistic, map, subject);
    if (subject.maps[statistic] && stretch.bins) subject.detail[statistic] = { ...stretch, until: subject.maps[statistic].until };
  }
}

function forgetDetail(subject) {
  if (!subject.whole) return;
  subject.lines = subject.whole;
  delete subject.whole;
  delete subject.detail;
}

/** `line` with the bins of `detail` in place of those that they cover. */
function spliced(line, detail) {
  if (!detail.first.length) return line;
  const [from, to] = [detail.first[0], detail.last[detail.last.length - 1]];
  const kept = [...line.first.keys()];
  const before = kept.filter((i) => line.last[i] < from);
  const behind = kept.filter((i) => line.first[i] > to);
  const part = (name, other = name) => Float64Array.from([
    ...before.map((i) => (line[name] ?? line[other])[i]), ...(detail[name] ?? detail[other]), ...behind.map((i) => (line[name] ?? line[other])[i]),
  ]);
  return { first: part("first"), last: part("last"), x: part("x"), mid: part("mid"), low: part("low", "mid"), high: part("high", "mid"), nonfinite: part("nonfinite") };
}
