// Elements of the document. What a run calls things reaches it as text only, never as HTML.

/** An element: `on*` are listeners, `class`, `aria-*` and the like attributes; null children are left out. */
function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return element;
}

const byId = (id) => document.getElementById(id);

/** For those who listen: what just happened. */
function say(sentence) {
  byId("said").textContent = sentence;
}

async function copied(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch {
      // Not permitted here: the older way may be.
    }
  }
  const area = el("textarea", { class: "unseen", "aria-hidden": "true" });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}

/** Code with a button that copies it. */
function codeBlock(code, label) {
  const button = el("button", { type: "button", "aria-label": `Copy ${label}` }, "Copy");
  button.addEventListener("click", async () => {
    const done = await copied(code);
    button.textContent = done ? "Copied" : "Select it";
    say(done ? `Copied ${label}` : "The browser did not let the page copy.");
    setTimeout(() => { button.textContent = "Copy"; }, 1600);
  });
  const box = el("div", { class: code.includes("\n") ? "code" : "code line" });
  // A wide block scrolls, and what scrolls can be reached by keyboard.
  box.append(el("pre", { tabindex: 0, role: "region", "aria-label": `Code: ${label}` }, el("code", {}, code)), button);
  return box;
}

function table(caption, headings, rows, properties = {}) {
  const head = headings.map((heading) =>
    el("th", { scope: "col", class: heading.number ? "number" : null }, heading.name ?? heading));
  return el("table", properties,
    el("caption", { class: properties.class ? "unseen" : null }, caption),
    el("thead", {}, el("tr", {}, head)),
    el("tbody", {}, rows));
}

function scrolling(content, label) {
  return el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": label }, content);
}

function level(name) {
  return el("span", { class: "level", "data-level": name }, name);
}

/** A button that opens the panel of a layer. */
function layerLink(subject, layer) {
  return el("button", { type: "button", class: "layer-link", onclick: () => go({ subject, layer }) }, layer);
}

/** Replace what an element holds if the value that it shows has changed, so that nothing open closes by itself. */
const shown = new WeakMap();
function show(element, value, build) {
  const text = JSON.stringify(value);
  if (shown.get(element) === text) return;
  const open = new Set([...element.querySelectorAll("details[open]")].map((details) => details.dataset.key));
  shown.set(element, text);
  element.replaceChildren(...build());
  for (const details of element.querySelectorAll("details")) {
    if (details.dataset.key && open.has(details.dataset.key)) details.open = true;
  }
}

const details = (key, summary, ...children) => el("details", { "data-key": key }, el("summary", {}, summary), ...children);
