// Now: what is in memory, who is served, how fast, and what went wrong.

import { api } from "./api.js";
import { curve } from "./curve.js";
import { button, h } from "./dom.js";
import { bytes, clock, many, rate, seconds, shortName } from "./format.js";
import { progressBar } from "./models-view.js";
import { store } from "./store.js";
import { View, attempt } from "./view.js";

class NowView extends View {
  static events = ["change", "second"];

  act(action, arg) {
    if (action === "end") {
      attempt(api.json(`/v1/answers/${encodeURIComponent(arg)}`, { method: "DELETE" }), "The answer was ended.");
    } else if (action === "unload" || action === "cancel") {
      attempt(api.json("/v1/models/unload", { method: "POST", body: { model_id: arg } }));
    } else if (action === "chat") {
      document.dispatchEvent(new CustomEvent("chat-with", { detail: arg }));
    }
  }

  render() {
    const state = store.state;
    if (!state) return [h("header", { class: "top" }, h("h1", {}, "Now")), h("p", { class: "empty" }, "Waiting for mlxproxy…")];
    const firsts = store.samples.map((sample) => sample.first);
    const lastFirst = firsts.findLast((value) => value !== null);
    return [
      h("header", { class: "top" }, h("h1", {}, "Now"),
        h("p", { class: "muted" }, `${many(state.in_flight, "answer")} in flight, ${state.waiting} waiting.`)),
      h("section", { class: "card", "aria-label": "Memory" }, memory(state)),
      h("div", { class: "pair" },
        h("section", { class: "card" }, curve({ title: "Speed", unit: "tokens/s", values: store.samples.map((sample) => sample.speed),
          now: rate(store.samples.at(-1)?.speed || state.tokens_per_second?.now || 0) })),
        h("section", { class: "card" }, curve({ title: "Time to first token", unit: "s", dots: true, values: firsts,
          now: lastFirst === undefined ? "–" : lastFirst.toFixed(2) }))),
      h("section", { "aria-labelledby": "in-memory" }, h("h2", { id: "in-memory" }, "In memory"), residents()),
      h("section", { "aria-labelledby": "served" }, h("h2", { id: "served" }, "Being served"), served()),
      h("section", { "aria-labelledby": "failed" }, h("h2", { id: "failed" }, "Last failures"), failures()),
    ];
  }
}

function memory(state) {
  const held = state.memory_bytes ?? 0;
  const budget = state.memory_budget_bytes;
  const whole = Math.max(budget ?? held, held, 1);
  let x = 0;
  const parts = store.residents.map((model, at) => {
    const width = ((model.memory_bytes ?? 0) / whole) * 100;
    const part = bar(x, width, at);
    x += width;
    return { part, model, at };
  });
  const words = budget ? `${bytes(held)} of ${bytes(budget)}` : bytes(held);
  return [
    h("figure", { class: "memory" },
      h("figcaption", {}, h("span", {}, "Memory for models"), h("strong", {}, words)),
      svgBar(parts.map((each) => each.part), `${words} in use`)),
    parts.length > 0 && h("ul", { class: "legend" }, parts.map(({ model, at }) =>
      h("li", { "data-key": String(model.slot) }, h("i", { class: `dot shade${at % 4}`, "aria-hidden": "true" }),
        `${shortName(model.id)} `, h("span", { class: "muted" }, bytes(model.memory_bytes))))),
  ];
}

const NS = "http://www.w3.org/2000/svg";
function bar(x, width, at) {
  const rect = document.createElementNS(NS, "rect");
  for (const [name, value] of Object.entries({ x, width, y: 0, height: 10, class: `shade${at % 4}` })) rect.setAttribute(name, value);
  return rect;
}

function svgBar(parts, label) {
  const box = document.createElementNS(NS, "svg");
  for (const [name, value] of Object.entries({ viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": label, class: "bar" })) box.setAttribute(name, value);
  box.append(...parts);
  return box;
}

function residents() {
  const loading = store.loads.filter((load) => store.resident(load.id)?.state !== "ready");
  const shown = store.residents.filter((model) => !loading.some((load) => load.id === model.id));
  if (!shown.length && !loading.length) {
    return h("p", { class: "empty" }, "No model is loaded. ", h("a", { href: "#models" }, "Choose one"), ", or send a request that names one.");
  }
  return h("ul", { class: "rows" },
    loading.map((load) => h("li", { class: "row", "data-key": `load-${load.id}` },
      h("div", { class: "what" }, h("h3", {}, shortName(load.id), h("span", { class: "badge loading" }, "loading")), progressBar(load)),
      h("div", { class: "acts" }, button("cancel", "Cancel", { "data-arg": load.id, "aria-label": `Cancel the load of ${load.id}` })))),
    shown.map((model) => h("li", { class: "row", "data-key": model.id },
      h("div", { class: "what" },
        h("h3", {}, shortName(model.id), h("span", { class: `badge ${model.state}` }, model.state === "ready" ? "loaded" : model.state),
          model.pinned && h("span", { class: "tag" }, "pinned")),
        h("dl", { class: "facts" },
          fact("Memory", bytes(model.memory_bytes)),
          fact("Speed", speed(model)),
          fact("In flight", `${model.in_flight}`),
          fact("Waiting", `${model.waiting}`),
          fact("Unload when idle", idle(model)),
          model.enable_thinking && fact("Thinking", "on"))),
      h("div", { class: "acts" },
        button("chat", "Chat", { "data-arg": model.id, class: "primary", "aria-label": `Chat with ${model.id}` }),
        button("unload", "Unload", { "data-arg": model.id, "aria-label": `Unload ${model.id}` })))));
}

const fact = (name, value) => h("div", {}, h("dt", {}, name), h("dd", {}, value));

function speed(model) {
  const { now, last } = model.tokens_per_second ?? {};
  if (now) return `${rate(now)} tokens/s`;
  return last ? `${rate(last)} tokens/s (last)` : "–";
}

function idle(model) {
  if (model.options?.ttl === 0 || model.options?.ttl === null) return "never";
  if (model.in_flight) return "not while it answers";
  if (model.last_used_at === null && model.idle_unload_in === null) return "never";
  const left = (model.last_used_at ?? model.loaded_at) + model.options.ttl - store.time;
  return `in ${seconds(Math.max(0, left))}`;
}

function served() {
  if (!store.answers.length) return h("p", { class: "empty" }, "Nobody is waiting for an answer.");
  return h("div", { class: "wide rows", tabindex: "0", role: "region", "aria-label": "Answers under way" }, h("table", { class: "served" },
    h("thead", {}, h("tr", {}, ["Client", "Path", "Model", "State", "Tokens", "Time"].map((name, at) => h("th", { scope: "col", class: at > 3 ? "end" : null }, name)),
      h("th", { scope: "col" }, h("span", { class: "away" }, "End it")))),
    h("tbody", {}, store.answers.map((answer) => h("tr", { "data-key": answer.name },
      h("td", {}, answer.client), h("td", {}, h("code", {}, answer.path)), h("td", {}, shortName(answer.model) || "–"),
      h("td", {}, { waiting: "waiting", reading: "reads the prompt", answering: "answers" }[answer.phase]),
      h("td", { class: "end" }, String(answer.tokens_out)), h("td", { class: "end" }, seconds(answer.seconds)),
      h("td", { class: "end" }, button("end", "End", { "data-arg": answer.name, class: "danger", "aria-label": `End the answer to ${answer.client}` })))))));
}

function failures() {
  if (!store.failures.length) return h("p", { class: "empty" }, "None that this page knows of.");
  return h("ul", { class: "rows" }, store.failures.slice(0, 8).map((failure) => h("li", { class: "row", "data-key": `${failure.at}-${failure.id}` },
    h("div", { class: "what" }, h("p", {}, h("time", { class: "muted" }, clock(failure.at)), " ", failure.id && h("strong", {}, shortName(failure.id)), " ", failure.reason),
      failure.log?.length > 0 && h("details", {}, h("summary", {}, "Last lines of its log"), h("pre", { tabindex: "0" }, failure.log.join("\n")))))));
}

customElements.define("mlx-now", NowView);
