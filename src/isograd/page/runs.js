// The list of runs: fetched anew while it is looked at, each row kept in place so that ticks and focus stay.
"use strict";
(() => {
  const EVERY = 2000; // ms
  const element = (id) => document.getElementById(id);
  const rows = new Map(); // run id -> its row, with the cells that change
  let runs = [];

  dropToken();
  element("search").addEventListener("input", show);
  element("choose").addEventListener("submit", compare);
  element("runs").addEventListener("change", showChoice);
  document.addEventListener("visibilitychange", () => document.hidden || look());
  setInterval(() => document.hidden || look(), EVERY);
  look();

  // The cookie knows the token from now on: it need not stay in the address bar and in the history.
  function dropToken() {
    const url = new URL(location.href);
    if (!url.searchParams.has("token")) return;
    url.searchParams.delete("token");
    history.replaceState(history.state, "", url);
  }

  async function look() {
    try {
      const answer = await fetch("/api/runs");
      if (answer.status === 403) throw new Error(await answer.text());
      if (!answer.ok) throw new Error(`The server answers with status ${answer.status}.`);
      runs = (await answer.json()).reverse();
      tell("");
    } catch (error) {
      // What fetch() says of a server that is gone differs from browser to browser.
      tell(error instanceof TypeError ? "The server does not answer; this goes on when it does." : error.message);
      return;
    }
    show();
  }

  function tell(sentence) {
    element("failure").hidden = !sentence;
    element("failure").textContent = sentence;
  }

  function show() {
    const words = element("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const isAsked = (run) => {
      const text = [run.id, run.script, run.state, ...run.subjects].join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    };
    const ids = new Set(runs.map((run) => run.id));
    for (const [id, row] of rows) if (!ids.has(id)) (row.line.remove(), rows.delete(id));
    let before = null;
    for (const run of runs) {
      const row = rows.get(run.id) ?? made(run);
      update(row, run);
      row.line.hidden = !isAsked(run);
      // Moved only if it stands elsewhere: moving a row would take the focus from it.
      const place = before ? before.nextSibling : element("runs").firstChild;
      if (place !== row.line) element("runs").insertBefore(row.line, place);
      before = row.line;
    }
    showCounts(runs.filter(isAsked).length);
    showChoice();
  }

  function showCounts(shown) {
    const running = runs.filter((run) => run.state === "running").length;
    element("counted").hidden = !runs.length;
    element("counted").textContent = `${runs.length} ${runs.length === 1 ? "run" : "runs"}${running ? `, ${running} running` : ""}`;
    element("list").hidden = !shown;
    element("choose").hidden = !runs.length;
    element("none").hidden = shown > 0;
    element("none").textContent = runs.length
      ? "No run has these words in its script, id, state or subjects."
      : "No run has been recorded here yet. `isograd run SCRIPT` records one; it appears here as soon as it starts.";
  }

  function made(run) {
    const line = document.createElement("tr");
    const box = document.createElement("input");
    box.type = "checkbox";
    box.value = run.id;
    box.setAttribute("aria-label", `Compare ${run.id}`);
    line.insertCell().append(box);
    const name = document.createElement("th");
    name.scope = "row";
    const link = document.createElement("a");
    link.href = `/runs/${encodeURIComponent(run.id)}`;
    link.textContent = run.id;
    const script = document.createElement("div");
    script.className = "small muted";
    name.append(link, script);
    line.append(name);
    const state = document.createElement("span");
    state.className = "pill";
    line.insertCell().append(state);
    const started = document.createElement("time");
    line.insertCell().append(started);
    const steps = line.insertCell();
    steps.className = "number";
    const subjects = line.insertCell();
    const row = { line, box, script, state, started, steps, subjects };
    rows.set(run.id, row);
    return row;
  }

  function update(row, run) {
    write(row.script, run.script);
    write(row.state, run.state);
    row.state.dataset.state = run.state === "running" ? "live" : run.state;
    write(row.started, date(run.started));
    row.started.dateTime = run.started;
    write(row.steps, run.steps.toLocaleString("en"));
    write(row.subjects, run.subjects.join(", "));
  }

  // Only what differs is written: a screen reader, a selection and the layout stay undisturbed.
  function write(node, text) {
    if (node.textContent !== text) node.textContent = text;
  }

  // In the reader's own time zone, as 2026-11-22 01:08.
  function date(text) {
    const when = new Date(text);
    if (Number.isNaN(when.getTime())) return text;
    const two = (number) => String(number).padStart(2, "0");
    const day = [when.getFullYear(), two(when.getMonth() + 1), two(when.getDate())].join("-");
    return `${day} ${two(when.getHours())}:${two(when.getMinutes())}`;
  }

  function chosen() {
    return runs.map((run) => run.id).filter((id) => rows.get(id)?.box.checked);
  }

  function showChoice() {
    const ids = chosen();
    for (const { box } of rows.values()) box.disabled = ids.length >= 2 && !box.checked;
    element("compare").disabled = ids.length !== 2;
    write(element("hint"), ["Tick two runs to lay one over the other.", "Tick one more.", ""][Math.min(ids.length, 2)]);
  }

  // The list is latest first: the older run is the first, which the later one is laid over.
  function compare(event) {
    event.preventDefault();
    const [later, earlier] = chosen();
    if (earlier) location.href = `/compare?${new URLSearchParams({ a: earlier, b: later })}`;
  }
})();
