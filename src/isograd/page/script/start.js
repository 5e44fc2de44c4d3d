// The beginning: data in, charts in their places, and what to do when something changes.

function showWords() {
  const dataset = runs[0];
  if (!dataset) return;
  const name = dataset.run.script || dataset.run.id || "run";
  byId("title").textContent = runs.length > 1 ? `${name} and ${runs[1].run.script || runs[1].run.id}` : name;
  document.title = `${name} · isograd`;
  if (!feeds.length && dataset.run.state) showState(STATES[dataset.run.state] ?? "stopped", dataset.run.state === "running" ? "running when written" : dataset.run.state);
  showSubjects(dataset);
  showVerdict();
  showEvents();
  showTreatments();
  showProposals();
  showLayers();
  showOverhead();
  showFacts();
}

function showSubjects(dataset) {
  const host = byId("subjects");
  host.hidden = dataset.subjects.length < 2;
  show(host, [dataset.subjects.map((each) => each.name), state.subject], () => dataset.subjects.map((subject) =>
    el("button", { type: "button", "aria-pressed": String(subject.name === state.subject), onclick: () => go({ subject: subject.name, layer: null }) }, subject.name)));
}

function changed(keys) {
  if (!runs[0]) return;
  if (keys.has("tail") && keys.size === 1) { refresh(keys); return; }
  const subject = shownSubject(runs[0]);
  setTimeMargin(subject?.maps[heatmapStatistic(subject)]?.names ?? []);
  if (["data", "subject", "layer", "trial"].some((key) => keys.has(key))) showWords();
  byId("zoom").hidden = state.range === null;
  if (keys.has("range") && feeds.length) loadDetail(); // gives up the old stretch at once, brings the new one later
  refresh(keys);
  showPanel();
  if (keys.has("view")) scrollToView();
}

function scrollToView() {
  const section = state.view && byId(state.view);
  if (!section) return;
  section.scrollIntoView();
  section.focus({ preventScroll: true });
}

function fillContents() {
  const sections = [...document.querySelectorAll("main > section")];
  const links = new Map(sections.map((section) => {
    const name = section.querySelector("h2")?.textContent ?? "";
    const link = el("a", { href: `#view=${section.id}` }, section.id === "verdict" ? "Verdict" : name);
    link.addEventListener("click", (event) => {
      event.preventDefault();
      state.view = null; // so that the same link works twice
      go({ view: section.id });
    });
    return [section, link];
  }));
  byId("contents").append(...[...links.values()].map((link) => el("li", {}, link)));
  const here = () => {
    const current = sections.findLast((section) => section.getBoundingClientRect().top < innerHeight / 3) ?? sections[0];
    for (const [section, link] of links) {
      if (section === current) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  };
  addEventListener("scroll", here, { passive: true });
  here();
}

function makeCharts() {
  addChart(lossChart);
  const pair = el("div", { class: "pair" });
  byId("signal").querySelector(".charts").append(pair);
  const count = document.body.dataset.compare || byId("compare") ? 2 : 1;
  pair.dataset.count = count;
  for (let place = 0; place < count; place++) {
    const half = el("div", {});
    pair.append(half);
    addChart(heatChart(place), half);
  }
  [depthChart, updateChart, saturationChart, deadChart, gradientChart, clipChart, scaleChart, rateChart, effectChart, curveChart, costChart]
    .forEach((chart) => addChart(chart));
}

function fail(sentence) {
  byId("failure").hidden = !sentence;
  byId("failure").textContent = sentence;
}

/** Charts are as wide as their places: new places, new drawings. */
function watchWidth() {
  let width = byId("main").clientWidth;
  let timer = null;
  new ResizeObserver(() => {
    if (byId("main").clientWidth === width) return;
    width = byId("main").clientWidth;
    clearTimeout(timer);
    timer = setTimeout(() => changed(new Set(["width"])), 120);
  }).observe(byId("main"));
}

/** Paper is white, and shows what has not been scrolled to. */
function print() {
  const theme = document.documentElement.dataset.theme;
  addEventListener("afterprint", () => {
    document.documentElement.dataset.theme = theme;
    refresh(new Set(["theme"]));
  }, { once: true });
  document.documentElement.dataset.theme = "light";
  refresh(new Set(["theme"]));
  drawAll();
}

/** A token that opened the page is in a cookie by now: it does not belong into bookmarks and screenshots. */
function dropToken() {
  const address = new URL(location.href);
  if (!address.searchParams.has("token")) return;
  address.searchParams.delete("token");
  history.replaceState(history.state, "", address);
}

function wire() {
  onChange = changed;
  byId("theme").addEventListener("click", switchTheme);
  byId("help").addEventListener("click", () => byId("keys").showModal());
  byId("zoom").addEventListener("click", wholeRun);
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault();
    state.view = null;
    go({ view: "verdict" });
  });
  addEventListener("keydown", pressed);
  addEventListener("hashchange", () => go(readAddress()));
  addEventListener("beforeprint", print);
  systemTheme.addEventListener("change", () => { applyTheme(); changed(new Set(["theme"])); });
}

async function start() {
  if (!byId("page")) return; // another page of the server, which only wants the theme
  wire();
  fillContents();
  makeCharts();
  watchWidth();
  document.body.dataset.arriving = "true";
  const { live, compare } = document.body.dataset;
  if (live) {
    dropToken();
    document.addEventListener("visibilitychange", sleepOrWake);
    await Promise.all([follow(live, 0), ...(compare ? [follow(compare, 1)] : [])]);
  } else {
    runs = ["data", "compare"].map(byId).filter(Boolean).map((script) => opened(JSON.parse(script.textContent)));
  }
  Object.assign(state, readAddress());
  settle();
  changed(new Set(["data", "view"]));
  delete document.body.dataset.arriving;
  document.documentElement.dataset.ready = "true";
}

// Words first: they stand there before the browser has read plotly's megabytes. Charts follow when it has.
let started = false;
function startOnce() {
  if (started) return;
  started = true;
  start();
}
addEventListener("isograd-data", startOnce);
document.addEventListener("readystatechange", startOnce);
addEventListener("DOMContentLoaded", () => charts.filter((chart) => chart.inSight).forEach(draw));
