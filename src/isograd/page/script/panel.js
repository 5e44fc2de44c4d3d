// The panel of one layer: its facts and all that was read of it over time.

let panelCharts = [];
let panelKey = null;
let cameFrom = null; // the element to return to

function showPanel() {
  const panel = byId("panel");
  const subject = shownSubject(runs[0]);
  const layer = subject?.layers.find((each) => each.name === state.layer);
  if (!layer) return closePanel();
  const maps = Object.values(subject.maps).filter((map) => map.layers.includes(layer.name));
  const key = [subject.name, layer.name, ...maps.map((map) => map.statistic)].join("\n");
  if (key === panelKey) return;
  const opening = panelKey === null;
  if (opening) cameFrom = document.activeElement;
  dropPanelCharts();
  panelKey = key;
  panel.hidden = false;
  const host = el("div", { class: "charts" });
  panel.replaceChildren(
    el("header", {},
      el("h2", { id: "panel-heading", class: "mono" }, layer.name),
      el("button", { type: "button", onclick: () => neighbour(-1), "aria-label": "Previous layer (k)" }, "↑"),
      el("button", { type: "button", onclick: () => neighbour(1), "aria-label": "Next layer (j)" }, "↓"),
      el("button", { type: "button", onclick: () => go({ layer: null }), "aria-label": "Close (Esc)" }, "✕")),
    layerFacts(subject, layer),
    host);
  if (!maps.length) host.append(el("p", { class: "absent" }, "Nothing was read of this layer over time."));
  panelCharts = maps.map((map) => addChart(panelChart(map.statistic, layer.name), host));
  for (const chart of panelCharts) prepare(chart);
  if (opening && !document.body.dataset.arriving) panel.focus({ preventScroll: true });
  say(`Layer ${layer.name}`);
}

function layerFacts(subject, layer) {
  const own = subject.parameters.filter((parameter) => parameter.layer === layer.name);
  const facts = [
    ["Type", layer.type || layer.kind], ["Role", layer.role], ["Output", (layer.shape ?? []).join(" × ")], ["Units", layer.units || null],
    ["Fan in → out", layer.fan_in || layer.fan_out ? `${layer.fan_in} → ${layer.fan_out}` : null],
    ...own.map((parameter) => [parameter.name.startsWith(`${layer.name}.`) ? parameter.name.slice(layer.name.length + 1) : parameter.name,
      `${(parameter.shape ?? []).join(" × ")} ${parameter.dtype ?? ""}${parameter.trainable === false ? ", frozen" : ""}`]),
  ];
  const causes = (runs[0].verdict?.causes ?? []).filter((cause) => cause.layers?.includes(layer.name) && (!cause.subject || cause.subject === subject.name));
  return el("div", {},
    causes.length ? el("p", {}, ...causes.flatMap((cause) => [level(cause.level), ` ${cause.name}, since step ${cause.first_step} `])) : null,
    factList(facts));
}

function closePanel() {
  if (panelKey === null) return;
  panelKey = null;
  const panel = byId("panel");
  const within = panel.contains(document.activeElement);
  dropPanelCharts();
  panel.hidden = true;
  panel.replaceChildren();
  if (within && cameFrom?.isConnected) cameFrom.focus({ preventScroll: true });
}

function dropPanelCharts() {
  panelCharts.forEach(dropChart);
  panelCharts = [];
}

function panelChart(statistic, layer) {
  return {
    id: `panel-${statistic}`, kind: "time", on: ["subject", "range"],
    build() {
      const series = views().flatMap((view) => {
        const map = view.subject.maps[statistic];
        const rows = map ? map.layers.flatMap((name, row) => (name === layer ? [row] : [])) : [];
        return rows.map((row, i) => ({
          line: rowLine(map, row), view, unit: unit(view.dataset, statistic),
          color: colour(SERIES[i % SERIES.length]), dash: view.dash,
          name: `${ownName(map.names[row], layer) || label(statistic)}${view.suffix}`,
        }));
      });
      if (!series.length) return { absent: "" };
      const pairs = series.map((each) => [each.line.x, each.line.mid]);
      const powers = wantsLog(pairs);
      const legend = series.length > 1;
      const height = legend ? 168 : 142;
      const layout = timeLayout(null, { height, log: powers, legend, range: valueRange(pairs, powers), margin: { l: 62, r: 12, b: 30, t: legend ? 28 : 10 } });
      layout.xaxis.title = { text: "" };
      const lost = series.flatMap((each) => nonfiniteTrace(each.line)).slice(0, 1);
      return {
        height,
        layout: { ...layout, yaxis2: marksAxis },
        traces: [...series.flatMap((each) => lineTraces(each.line, { ...each, name: plotText(each.name), log: powers })), ...lost],
        caption: [el("span", { class: "title" }, label(statistic)), series[0].unit ? el("span", {}, series[0].unit) : ""],
        words: `${label(statistic)} of ${layer}. ${series.map((each) => `${each.name}: ${inWords(each.line, each.unit)}`).join(". ")}.`,
        readings: readingsOf(series),
      };
    },
  };
}

/** `weight` for `net.3.weight` of layer `net.3`; nothing where the row is the layer itself. */
function ownName(name, layer) {
  return name === layer ? "" : name.startsWith(`${layer}.`) ? name.slice(layer.length + 1) : name;
}

function neighbour(by) {
  const subject = shownSubject(runs[0]);
  const names = subject ? measuredLayers(subject) : [];
  if (!names.length) return;
  const now = names.indexOf(state.layer);
  const next = now < 0 ? (by > 0 ? 0 : names.length - 1) : Math.max(0, Math.min(names.length - 1, now + by));
  go({ layer: names[next] });
}
