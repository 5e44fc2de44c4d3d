// Events, layers, cost and facts: what is best read as text.

const MOST_ROWS = 200;
const everyRow = new Set(); // tables whose user asked for all rows

function cut(key, entries) {
  return everyRow.has(key) ? entries : entries.slice(0, MOST_ROWS);
}

function restButton(key, entries) {
  if (entries.length <= MOST_ROWS || everyRow.has(key)) return null;
  return el("button", { type: "button", onclick: () => { everyRow.add(key); showWords(); } }, `Show all ${entries.length}`);
}

function showEvents() {
  const host = byId("events").querySelector(".words");
  const subject = shownSubject(runs[0]);
  const events = subject?.events ?? [];
  show(host, [subject?.name, events, everyRow.has("events")], () => {
    if (!events.length) return [el("p", { class: "absent" }, "Nothing happened besides training.")];
    const rows = cut("events", events).map((event) => el("tr", {},
      el("td", { class: "number" }, el("button", { type: "button", class: "layer-link", onclick: () => go({ step: event.step }) }, String(event.step ?? ""))),
      el("td", {}, level(event.level ?? "info")),
      el("td", { class: "keep" }, event.kind),
      el("td", {}, event.layer && subject.layerNames.has(event.layer) ? layerLink(subject.name, event.layer) : event.layer ?? ""),
      el("td", {}, event.text)));
    return [
      scrolling(table(`${counted(events.length, "event")}, in the order of steps`,
        [{ name: "Step", number: true }, "Level", "Kind", "Layer", "What"], rows), "Events"),
      restButton("events", events),
    ].filter(Boolean);
  });
}

let wanted = ""; // what the search holds

function showLayers() {
  const host = byId("layers").querySelector(".words");
  const subject = shownSubject(runs[0]);
  if (!host.querySelector("input")) host.replaceChildren(...layerSearch());
  const body = host.querySelector(".found");
  const layers = subject?.layers ?? [];
  const words = wanted.toLowerCase().split(/\s+/).filter(Boolean);
  const found = layers.filter((layer) => {
    const text = `${layer.name} ${layer.kind} ${layer.type} ${layer.role} ${(layer.parameters ?? []).join(" ")}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  show(body, [subject?.name, layers.length, found.map((layer) => layer.name), state.layer, everyRow.has("layers"), lastValues(subject)], () => {
    if (!layers.length) return [el("p", { class: "absent" }, "No layers were described.")];
    if (!found.length) return [el("p", { class: "absent" }, "No layer is called so.")];
    const rows = cut("layers", found).map((layer) => layerRow(subject, layer));
    return [
      scrolling(table(`${found.length === layers.length ? "" : `${found.length} of `}${counted(layers.length, "layer")}, in the order of the model`,
        ["Layer", "Type", "Role", { name: "Units", number: true }, { name: "Fan in → out", number: true }, "Parameters", { name: "Signal", number: true }], rows), "Layers"),
      restButton("layers", found),
    ].filter(Boolean);
  });
}

function layerSearch() {
  const input = el("input", {
    type: "search", id: "search", placeholder: "Search (/)", "aria-label": "Search layers",
    oninput: (event) => { wanted = event.target.value; showLayers(); },
  });
  return [input, el("div", { class: "found" })];
}

function layerRow(subject, layer) {
  const own = subject.parameters.filter((parameter) => parameter.layer === layer.name);
  return el("tr", { "aria-current": layer.name === state.layer ? "true" : null },
    el("th", { scope: "row" }, layerLink(subject.name, layer.name)),
    el("td", {}, layer.type || layer.kind || ""),
    el("td", {}, layer.role ?? ""),
    el("td", { class: "number" }, layer.units ? String(layer.units) : ""),
    el("td", { class: "number" }, layer.fan_in || layer.fan_out ? `${layer.fan_in} → ${layer.fan_out}` : ""),
    el("td", {}, own.map((parameter) => {
      const short = parameter.name.startsWith(`${layer.name}.`) ? parameter.name.slice(layer.name.length + 1) : parameter.name;
      return `${short} ${(parameter.shape ?? []).join("×")}${parameter.trainable === false ? " (frozen)" : ""}`;
    }).join(", ")),
    el("td", { class: "number" }, lastValues(subject)?.[layer.name] ?? ""));
}

/** The last reading of the gradient signal by layer, as text. */
const lasts = new WeakMap();
function lastValues(subject) {
  const map = subject?.maps.signal_norm;
  if (!map) return null;
  if (!lasts.has(map)) {
    lasts.set(map, Object.fromEntries(map.names.map((name, row) => {
      for (let bin = map.bins - 1; bin >= 0; bin--) {
        if (finite(at(map, row, bin))) return [name, written(at(map, row, bin))];
      }
      return [name, ""];
    })));
  }
  return lasts.get(map);
}

function showOverhead() {
  const host = byId("overhead").querySelector(".words");
  const { overhead, seconds } = runs[0]?.run ?? {};
  show(host, [overhead, seconds], () => [el("p", {}, finite(overhead)
    ? `Watching took ${percent(overhead)} of the wall time${seconds ? ` of ${duration(seconds)}` : ""}.`
    : "What watching cost was not recorded.")]);
}

function showFacts() {
  const host = byId("facts").querySelector(".words");
  show(host, runs.map((dataset) => [dataset.run, dataset.subjects.map((each) => each.groups)]), () => runs.flatMap((dataset, place) => {
    const { run } = dataset;
    const facts = [
      ["Run", run.id], ["Script", run.script], ["State", run.state], ["Started", String(run.started ?? "").replace(/\.\d+/, "")], ["Steps", run.steps],
      ["Wall time", run.seconds ? duration(run.seconds) : null],
      ...Object.entries(run.versions ?? {}), ...Object.entries(run.meta ?? {}),
      ["Page made", dataset.raw.generated],
    ];
    return [
      runs.length > 1 ? el("h3", {}, runName(dataset, place)) : null,
      factList(facts),
      ...dataset.subjects.flatMap((subject) => subject.groups.flatMap((group, i) => [
        el("h3", {}, `${dataset.subjects.length > 1 ? `${subject.name}: ` : ""}parameter group ${i}`), factList(Object.entries(group)),
      ])),
    ].filter(Boolean);
  }));
}

function factList(facts) {
  const told = facts.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return el("dl", { class: "facts" }, told.map(([name, value]) =>
    el("div", {}, el("dt", {}, String(name).replaceAll("_", " ")), el("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)))));
}
