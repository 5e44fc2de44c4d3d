// What is being looked at. It lives in the address, so that an address shows another reader the same.

const state = {
  subject: null, // name
  layer: null, // name; null: no panel
  step: null, // null: the last one
  view: null, // id of a section
  range: null, // [first, last] step in sight; null: all. Not in the address: a zoom is a passing thing.
  statistic: null, // of the heatmap; null: the first that there is
};

const KEPT = ["subject", "layer", "step", "view"];

let runs = []; // datasets: the run, and in compare mode the one laid over it

/** What to do when the state changes: start.js puts it here. */
let onChange = () => {};

function go(change) {
  const before = { ...state };
  Object.assign(state, change);
  settle();
  writeAddress();
  onChange(new Set(Object.keys(state).filter((key) => state[key] !== before[key])));
}

/** A name that this run does not have is let go of. */
function settle() {
  if (!runs[0]) return; // nothing is known yet: what the address asks for has to wait
  const subject = shownSubject(runs[0]);
  state.subject = subject?.name ?? null;
  if (state.layer !== null && !subject?.layerNames.has(state.layer)) state.layer = null;
  if (state.statistic !== null && subject && !(state.statistic in subject.maps)) state.statistic = null;
}

function shownSubject(dataset) {
  if (!dataset) return null;
  const named = dataset.subjects.find((subject) => subject.name === state.subject);
  if (named) return named;
  // The second run may call its subject otherwise; then places decide.
  const place = Math.max(0, runs[0]?.subjects.findIndex((subject) => subject.name === state.subject) ?? 0);
  return dataset.subjects[place] ?? dataset.subjects[0] ?? null;
}

/** The subjects to draw: of the run, solid; of the one compared with it, dashed. */
function views() {
  return runs
    .map((dataset, place) => ({
      dataset, place,
      subject: shownSubject(dataset),
      dash: place ? "dash" : "solid",
      suffix: runs.length > 1 ? ` · ${"AB"[place]}` : "",
    }))
    .filter((view) => view.subject);
}

function readAddress() {
  const given = new URLSearchParams(location.hash.slice(1));
  // `#loss` is understood as `#view=loss`.
  const view = given.get("view") ?? (byId(location.hash.slice(1)) ? location.hash.slice(1) : null);
  const step = Number.parseFloat(given.get("step") ?? "");
  return {
    subject: given.get("subject") ?? state.subject,
    layer: given.get("layer"),
    step: finite(step) ? step : null,
    view,
  };
}

function writeAddress() {
  const kept = new URLSearchParams();
  for (const key of KEPT) if (state[key] !== null && !isOnly(key)) kept.set(key, state[key]);
  const hash = kept.toString();
  if (location.hash.slice(1) === hash) return;
  history.replaceState(history.state, "", hash ? `#${hash}` : location.pathname + location.search);
}

const isOnly = (key) => key === "subject" && (runs[0]?.subjects.length ?? 0) < 2;

// ---- light and dark ----

const THEME = "isograd-theme";

function storedTheme() {
  try {
    return localStorage.getItem(THEME);
  } catch {
    return null; // storage is switched off: the system decides
  }
}

const systemTheme = matchMedia("(prefers-color-scheme: dark)");

function applyTheme() {
  const stored = storedTheme();
  const dark = stored === "dark" || (stored !== "light" && (document.documentElement.dataset.asked ?? (systemTheme.matches ? "dark" : "light")) === "dark");
  document.documentElement.dataset.theme = dark ? "dark" : "light";
}

function switchTheme() {
  const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  try {
    localStorage.setItem(THEME, next);
  } catch {
    document.documentElement.dataset.asked = next;
  }
  applyTheme();
  say(`${next} theme`);
  onChange(new Set(["theme"]));
}

// At once, while the head is read: the page must not flash in the other colours.
applyTheme();
