// Markdown as models write it, made into elements. A small and forgiving part of CommonMark: HTML is
// shown as text, an image is a link (nothing is ever fetched), and a link leads to the web or to mail.
// Whatever the text is, the work is proportional to its length.

import { h, icon } from "./dom.js";

const DEPTH = 8; // of lists and quotes within each other, and of emphasis within emphasis
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^\s`]*)/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:[ \t]+|$)/;
const DIVIDER = /^\|?[ ]*:?-+:?[ ]*(?:\|[ ]*:?-+:?[ ]*)*\|?$/;
const LONGEST_LINE = 5000; // characters beyond which a line is a paragraph, whatever it looks like

/** Return the top-level blocks of a text, each as its lines. */
export function blocks(text) {
  const lines = text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n");
  const found = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const end = blockEnd(lines, at);
    found.push(lines.slice(at, end));
    at = end;
  }
  return found;
}

const fits = (pattern, line) => (line.length > LONGEST_LINE ? null : pattern.exec(line));
const isOrdered = (item) => /\d/.test(item[2]);
const indent = (line) => line.length - line.trimStart().length;
const startsTable = (lines, at) => at + 1 < lines.length && lines[at].includes("|") &&
  lines[at + 1].includes("-") && Boolean(fits(DIVIDER, lines[at + 1].trim()));
const startsBlock = (line) => fits(FENCE, line) || fits(HEADING, line) || fits(RULE, line) ||
  QUOTE.test(line) || fits(ITEM, line);

function blockEnd(lines, at) {
  const fence = fits(FENCE, lines[at]);
  if (fence) return fenceEnd(lines, at, fence[1]);
  if (fits(HEADING, lines[at]) || fits(RULE, lines[at])) return at + 1;
  if (QUOTE.test(lines[at])) return runEnd(lines, at, (line) => line.trim() && !fits(FENCE, line) && (QUOTE.test(line) || !startsBlock(line)));
  if (fits(ITEM, lines[at])) return listEnd(lines, at);
  if (startsTable(lines, at)) return runEnd(lines, at, (line) => line.includes("|"));
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines[end]) && !startsTable(lines, end)) end += 1;
  return end;
}

function runEnd(lines, at, belongs) {
  let end = at + 1;
  while (end < lines.length && belongs(lines[end])) end += 1;
  return end;
}

function fenceEnd(lines, at, fence) {
  for (let end = at + 1; end < lines.length; end += 1) {
    const line = lines[end].trim();
    if (line.length >= fence.length && line === fence[0].repeat(line.length)) return end + 1;
  }
  return lines.length; // it is still being written
}

function listEnd(lines, at) {
  const base = indent(lines[at]);
  const ordered = isOrdered(fits(ITEM, lines[at]));
  let end = at + 1;
  let fence = null;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (fence) {
      if (line.trim().startsWith(fence)) fence = null;
      continue;
    }
    const opened = fits(FENCE, line.trimStart());
    if (opened && indent(line) > base) fence = opened[1];
    if (!line.trim()) {
      const next = lines[end + 1];
      if (next === undefined || !(indent(next) > base || fits(ITEM, next))) break;
    } else if (indent(line) <= base) {
      const item = fits(ITEM, line);
      if (item ? isOrdered(item) !== ordered : startsBlock(line)) break;
    }
  }
  return end;
}

/** Return the element for one block. */
export function element(lines, depth = 0) {
  const first = lines[0];
  const fence = fits(FENCE, first);
  if (fence) return code(lines, fence);
  const heading = fits(HEADING, first);
  if (heading) {
    const level = Math.min(6, heading[1].length + 2); // the page has its own first and second
    return h(`h${level}`, {}, inline(heading[2] ?? ""));
  }
  if (fits(RULE, first)) return h("hr");
  if (depth < DEPTH && QUOTE.test(first)) {
    const inner = lines.map((line) => line.replace(QUOTE, "")).join("\n");
    return h("blockquote", {}, blocks(inner).map((block) => element(block, depth + 1)));
  }
  if (depth < DEPTH && fits(ITEM, first)) return list(lines, depth);
  if (startsTable(lines, 0)) return table(lines);
  return h("p", {}, inline(lines.map((line) => line.trimStart()).join("\n")));
}

function code(lines, [, fence, language]) {
  const last = lines.length > 1 ? lines.at(-1).trim() : "";
  const isClosed = last.length >= fence.length && last === fence[0].repeat(last.length);
  const text = lines.slice(1, isClosed ? -1 : undefined).join("\n");
  const copy = h("button", { type: "button", class: "quiet", "data-do": "copy-code" }, icon("copy"), "Copy");
  return h("figure", { class: "code" },
    h("figcaption", {}, h("span", {}, language || "text"), copy),
    h("pre", { tabindex: "0" }, h("code", {}, text)));
}

function list(lines, depth) {
  const first = fits(ITEM, lines[0]);
  const ordered = isOrdered(first);
  const nested = indent(lines[0]) + 2;
  const items = [];
  let content = 0;
  for (const line of lines) {
    const item = fits(ITEM, line);
    if (item && (items.length === 0 || indent(line) < nested)) {
      content = item[0].length;
      items.push([line.slice(item[0].length)]);
    } else {
      items.at(-1).push(line.slice(Math.min(indent(line), content)));
    }
  }
  const isLoose = items.some((item) => item.slice(0, -1).some((line, at) => at > 0 && !line.trim()));
  const attributes = ordered && first[2] !== "1." ? { start: parseInt(first[2], 10) } : {};
  return h(ordered ? "ol" : "ul", attributes, items.map((item) => {
    const found = blocks(item.join("\n")).map((block) => element(block, depth + 1));
    const content = isLoose ? found : found.map((node) => (node.tagName === "P" ? [...node.childNodes] : node));
    return h("li", {}, content);
  }));
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\|/, "").replace(/\|$/, "").split("|").map((cell) => cell.trim());
  const aligned = cells(lines[1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "end") : null));
  const row = (tag) => (line) => h("tr", {}, cells(line).map((cell, at) =>
    h(tag, { class: aligned[at], scope: tag === "th" ? "col" : null }, inline(cell))));
  return h("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Table" }, h("table", {},
    h("thead", {}, row("th")(lines[0])), h("tbody", {}, lines.slice(2).map(row("td")))));
}

const SPECIAL = /[\\`*_~[!<h\n]/g;
const TAGS = { "**": "strong", "__": "strong", "*": "em", "_": "em", "~~": "del" };
const ADDRESS = /^https?:\/\/[^\s<>"'`]+/;
const WORD = /[\p{L}\p{N}_]/u;

/** Return the nodes for a text within a block. */
export function inline(text, depth = 0) {
  const nodes = [];
  const next = new Map(); // where each closing occurs next: nobody looks for one twice
  let plain = "";
  const flush = () => { if (plain) nodes.push(plain); plain = ""; };
  const add = (node) => { flush(); nodes.push(node); };
  const closing = (mark, from) => {
    if (!(next.get(mark) >= from)) {
      const found = text.indexOf(mark, from);
      next.set(mark, found < 0 ? Infinity : found);
    }
    const found = next.get(mark);
    return found === Infinity ? -1 : found;
  };
  for (let at = 0; at < text.length;) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    if (!special) {
      plain += text.slice(at);
      break;
    }
    plain += text.slice(at, special.index);
    at = special.index;
    const taken = take(text, at, closing, depth);
    if (!taken) {
      plain += text[at];
      at += 1;
    } else {
      if (taken.node) add(taken.node);
      else plain += taken.text;
      at = taken.end;
    }
  }
  flush();
  return nodes;
}

function take(text, at, closing, depth) {
  const mark = text[at];
  if (mark === "\\") return at + 1 < text.length && /[!-/:-@[-`{-~]/.test(text[at + 1]) ? { text: text[at + 1], end: at + 2 } : null;
  if (mark === "\n") return { node: h("br"), end: at + 1 };
  if (mark === "`") {
    let end = at;
    while (text[end] === "`") end += 1;
    const fence = text.slice(at, end);
    const close = closing(fence, end);
    return close < 0 ? { text: fence, end } : { node: h("code", {}, text.slice(end, close).trim()), end: close + fence.length };
  }
  if (mark === "h") return bareLink(text, at);
  if (mark === "<") {
    const close = closing(">", at);
    const target = close < 0 || close - at > 2000 ? null : safe(text.slice(at + 1, close));
    return target ? { node: link(target, [target]), end: close + 1 } : null;
  }
  if (mark === "[" || (mark === "!" && text[at + 1] === "[")) return takeLink(text, mark === "!" ? at + 1 : at, closing, depth);
  return emphasis(text, at, closing, depth);
}

function bareLink(text, at) {
  if (!text.startsWith("http", at) || (at > 0 && WORD.test(text[at - 1]))) return null;
  let shown = ADDRESS.exec(text.slice(at, at + 2000))?.[0] ?? "";
  while (shown && ".,;:!?*_~)]".includes(shown.at(-1))) shown = shown.slice(0, -1);
  const target = safe(shown);
  return target ? { node: link(target, [shown]), end: at + shown.length } : null;
}

function takeLink(text, at, closing, depth) {
  const middle = closing("](", at);
  if (middle < 0 || middle - at > 1000) return null;
  const end = closing(")", middle);
  if (end < 0 || end - middle > 4000) return null;
  const label = text.slice(at + 1, middle);
  if (label.includes("[") || label.includes("\n\n")) return null;
  const target = safe(text.slice(middle + 2, end).trim().split(/\s/)[0]);
  if (!target || depth >= DEPTH) return null;
  return { node: link(target, label ? inline(label, DEPTH) : [target]), end: end + 1 };
}

function emphasis(text, at, closing, depth) {
  const mark = text[at] === text[at + 1] ? text[at] + text[at] : text[at];
  const tag = TAGS[mark];
  const from = at + mark.length;
  if (!tag || depth >= DEPTH || !text[from] || /\s/.test(text[from])) return null;
  if (mark[0] === "_" && at > 0 && WORD.test(text[at - 1])) return null; // as in snake_case
  let close = closing(mark, from);
  if (mark.length === 1 && text[close + 1] === mark) close = closing(mark, close + 2); // the end of strong
  if (close <= from || /\s/.test(text[close - 1])) return null;
  if (mark[0] === "_" && WORD.test(text[close + mark.length] ?? "")) return null;
  return { node: h(tag, {}, inline(text.slice(from, close), depth + 1)), end: close + mark.length };
}

/** Return a link's address if a click on it may lead there, else null. */
export function safe(address) {
  if (!/^(?:https?:\/\/|mailto:)/i.test(address)) return null;
  try {
    const url = new URL(address);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const link = (target, children) =>
  h("a", { href: target, target: "_blank", rel: "noopener noreferrer nofollow" }, children);

/** An element that shows a text which grows: only blocks that have changed are made again. */
export class Markdown extends HTMLElement {
  #shown = [];

  set text(value) {
    const found = blocks(value);
    let same = 0;
    const sources = found.map((lines) => lines.join("\n"));
    while (same < sources.length && this.#shown[same] === sources[same]) same += 1;
    while (this.childNodes.length > same) this.lastChild.remove();
    this.append(...found.slice(same).map((lines) => element(lines)));
    this.#shown = sources;
  }
}

customElements.define("mlx-markdown", Markdown);
