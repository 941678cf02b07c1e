// Building and updating elements. Text becomes text nodes, always: there is no way to give HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false)
    .map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

/** Return a new HTML element. */
export const h = (tag, attributes, ...children) =>
  fill(document.createElement(tag), attributes, children);

/** Return a new SVG element. */
export const svg = (tag, attributes, ...children) =>
  fill(document.createElementNS(SVG, tag), attributes, children);

/** Return a button whose click the view handles under the name of `action`. */
export const button = (action, label, attributes = {}) =>
  h("button", { type: "button", "data-do": action, ...attributes }, label);

const ICONS = {
  now: "M3 12h4l3-8 4 16 3-8h4",
  models: "M4 7l8-4 8 4-8 4zM4 12l8 4 8-4M4 17l8 4 8-4",
  chat: "M4 5h16v11H9l-5 4z",
  logs: "M5 6h14M5 12h14M5 18h9",
  connect: "M9 15l6-6M10.5 6.5l1-1a4.2 4.2 0 016 6l-1 1M13.500 17.500l-1 1a4.200 4.200 0 01-6-6l1-1",
  copy: "M9 9h11v11H9zM5 15H4V4h11v1",
  send: "M12 19V5M6 11l6-6 6 6",
  stop: "M7 7h10v10H7z",
  close: "M6 6l12 12M18 6L6 18",
  image: "M4 5h16v14H4zM4 16l5-5 4 4 3-3 4 4M9 9h.01",
  tune: "M4 8h9M17 8h3M4 16h3M11 16h9M13 8a2 2 0 104 0 2 2 0 10-4 0M7 16a2 2 0 104 0 2 2 0 10-4 0",
  list: "M4 6h16M4 12h16M4 18h16",
  again: "M20 11a8 8 0 10-2.300 6.300M20 5v6h-6",
  edit: "M4 20l1-4L16 5l3 3L8 19z",
  bin: "M5 7h14M9 7V4h6v3M7 7l1 13h8l1-13",
  plus: "M12 5v14M5 12h14",
};

/** Return an icon; it is decoration, so its button needs a label. */
export const icon = (name) =>
  svg("svg", { viewBox: "0 0 24 24", class: "icon", "aria-hidden": "true" }, svg("path", { d: ICONS[name] }));

/** Return a button that shows only an icon. */
export const iconButton = (action, name, label, attributes = {}) =>
  h("button", { type: "button", "data-do": action, "aria-label": label, title: label, ...attributes,
    class: `quiet square ${attributes.class ?? ""}`.trim() }, icon(name));

const isSame = (a, b) => a.nodeType === b.nodeType && a.nodeName === b.nodeName &&
  (a.nodeType !== 1 || a.getAttribute("data-key") === b.getAttribute("data-key"));

/**
 * Make the children of `old` like those of `fresh`, and keep every element that may stay: so focus,
 * selection, scrolling and a click under way survive. What the user changes (a value, an open
 * detail) is left alone, and so is the inside of an element with `data-opaque`.
 */
export function morph(old, fresh) {
  const keyed = new Map();
  for (const child of old.children) {
    const key = child.getAttribute("data-key");
    if (key !== null) keyed.set(key, child);
  }
  let place = old.firstChild;
  for (const wanted of [...fresh.childNodes]) {
    const key = wanted.nodeType === 1 ? wanted.getAttribute("data-key") : null;
    const found = key === null ? place : keyed.get(key);
    if (found && isSame(found, wanted)) {
      if (found !== place) old.insertBefore(found, place);
      else place = place.nextSibling;
      sync(found, wanted);
    } else {
      old.insertBefore(wanted, place);
    }
  }
  while (place) {
    const next = place.nextSibling;
    place.remove();
    place = next;
  }
}

function sync(node, wanted) {
  if (node.nodeType !== 1) {
    if (node.data !== wanted.data) node.data = wanted.data;
    return;
  }
  for (const { name } of [...node.attributes]) {
    if (!wanted.hasAttribute(name) && name !== "open") node.removeAttribute(name);
  }
  for (const { name, value } of wanted.attributes) {
    if (name !== "open" && node.getAttribute(name) !== value) node.setAttribute(name, value);
  }
  if (!node.hasAttribute("data-opaque")) morph(node, wanted);
}
