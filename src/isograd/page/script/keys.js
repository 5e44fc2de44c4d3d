// The keyboard. Letters are left alone while a field takes them.

const typing = (target) => target.closest?.("input:not([type=range]), textarea, select, [contenteditable]");

const KEYS = {
  j: () => neighbour(1),
  k: () => neighbour(-1),
  "]": () => neighbourStep(1),
  "[": () => neighbourStep(-1),
  "/": focusSearch,
  "?": () => byId("keys").showModal(),
  0: wholeRun,
  t: switchTheme,
};

function neighbourStep(by) {
  const map = depthRows(shownSubject(runs[0]) ?? { maps: {} })?.map;
  if (!map) return;
  const bin = Math.max(0, Math.min(map.bins - 1, heldBin(map) + by));
  go({ step: bin === map.bins - 1 && by > 0 ? null : map.first[bin] });
  say(stepsOf(map, bin));
}

function focusSearch() {
  const input = byId("search");
  input.scrollIntoView({ block: "center" });
  input.focus();
}

function pressed(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
  if (event.key === "Escape") {
    if (typing(event.target)) event.target.blur();
    else if (state.layer !== null) go({ layer: null });
    return;
  }
  if (typing(event.target) || !Object.hasOwn(KEYS, event.key)) return;
  event.preventDefault();
  KEYS[event.key]();
}
