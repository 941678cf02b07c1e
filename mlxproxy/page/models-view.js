// Models: what is on disk, whether it fits, and loading it.

import { api } from "./api.js";
import { button, h, icon } from "./dom.js";
import { bytes, context, count, many, publisher, seconds, shortName } from "./format.js";
import { loadDialog } from "./load-dialog.js";
import { store } from "./store.js";
import { View, attempt } from "./view.js";

const STEP = 60; // rows drawn at first, and more whenever the end comes near
const PHASES = {
  queued: "Queued", draining: "Waiting for answers in flight", stopping: "Making room",
  starting: "Starting", loading: "Reading the weights", warming: "First answer",
};
const SORTS = {
  state: ["Loaded first", (a, b) => rank(a) - rank(b) || byName(a, b)],
  name: ["Name", byName],
  size: ["Largest first", (a, b) => b.size_bytes - a.size_bytes || byName(a, b)],
  small: ["Smallest first", (a, b) => a.size_bytes - b.size_bytes || byName(a, b)],
  new: ["Newest first", (a, b) => b.created - a.created || byName(a, b)],
};

const collator = new Intl.Collator("en", { numeric: true, sensitivity: "base" });
function byName(a, b) { return collator.compare(a.id, b.id); }
const rank = (model) =>
  store.resident(model.id) ? 0 : store.load(model.id) ? 1 : model.loadable ? (model.fits ? 2 : 3) : 4;

/** Return a load's progress in words, and as a share from 0 to 1 where it is known. */
export function progress(load) {
  const words = [PHASES[load.phase] ?? load.phase];
  let share = null;
  if (load.bytes_read && load.bytes_total) {
    share = load.bytes_read / load.bytes_total;
    words.push(`${bytes(load.bytes_read)} of ${bytes(load.bytes_total)}`);
  } else if (load.last_seconds) {
    share = Math.min(0.97, load.seconds / load.last_seconds);
  }
  words.push(seconds(load.seconds) + (load.last_seconds ? ` (last time ${seconds(load.last_seconds)})` : ""));
  return { words: words.join(" · "), share };
}

export const progressBar = (load) => {
  const { words, share } = progress(load);
  return h("div", { class: "progress" },
    h("progress", share === null ? { "aria-label": `Loading ${load.id}` }
      : { value: share.toFixed(3), max: 1, "aria-label": `Loading ${load.id}` }),
    h("span", {}, words));
};

class ModelsView extends View {
  #query = "";
  #sort = "state";
  #only = "loadable";
  #drawn = STEP;
  #sorted = null; // with what it was sorted for

  made() {
    this.addEventListener("input", (event) => {
      const { name, value } = event.target;
      if (name === "query") this.#query = value;
      else if (name === "sort") this.#sort = value;
      else if (name === "only") this.#only = value;
      this.#drawn = STEP;
      this.draw();
    });
    this.observer = new IntersectionObserver((entries) => {
      if (entries.some((entry) => entry.isIntersecting)) {
        this.#drawn += STEP;
        this.draw();
      }
    }, { rootMargin: "800px" });
  }

  act(action, id) {
    if (action === "load") loadDialog(store.model(id));
    else if (action === "quick-load") {
      attempt(api.json("/v1/models/load", { method: "POST", body: { model_id: id, wait: false } }));
    } else if (action === "unload" || action === "cancel") {
      attempt(api.json("/v1/models/unload", { method: "POST", body: { model_id: id } }),
        action === "cancel" ? `The load of ${shortName(id)} was cancelled.` : `${shortName(id)} is unloaded.`);
    } else if (action === "chat") {
      document.dispatchEvent(new CustomEvent("chat-with", { detail: id }));
    }
  }

  #found() {
    const key = [this.#query, this.#sort, this.#only, store.residents.map((each) => each.id).join(),
      store.loads.map((each) => each.id).join()].join("\n");
    if (this.#sorted?.models !== store.models || this.#sorted.key !== key) {
      const words = this.#query.toLowerCase().split(/\s+/).filter(Boolean);
      const fits = (model) => {
        if (this.#only === "loadable" && !model.loadable) return false;
        if (this.#only === "not" && model.loadable) return false;
        const text = [model.id, model.architecture, model.quantization?.name, model.reason,
          ...abilities(model)].join(" ").toLowerCase();
        return words.every((word) => text.includes(word));
      };
      this.#sorted = { models: store.models, key, found: store.models.filter(fits).sort(SORTS[this.#sort][1]) };
    }
    return this.#sorted.found;
  }

  render() {
    const all = store.models ?? [];
    const found = store.models ? this.#found() : [];
    const unusable = all.filter((model) => !model.loadable).length;
    requestAnimationFrame(() => {
      this.observer.disconnect();
      const end = this.querySelector(".more");
      if (end) this.observer.observe(end);
    });
    return [
      h("header", { class: "top" }, h("h1", {}, "Models"),
        h("p", { class: "muted" }, !store.models ? (store.modelsError ?? "Reading the list…")
          : [`${many(all.length - unusable, "model")} can be loaded`,
            unusable ? `, ${count(unusable)} cannot` : "", store.complete ? "." : "; a folder is still being read."])),
      h("div", { class: "filters", role: "search" },
        h("input", { type: "search", name: "query", placeholder: "Search name, type, 4bit, tools…", "aria-label": "Search models", autocomplete: "off", spellcheck: "false" }),
        h("select", { name: "only", "aria-label": "Which models" },
          h("option", { value: "loadable" }, "Can be loaded"), h("option", { value: "not" }, "Cannot be loaded"), h("option", { value: "all" }, "All")),
        h("select", { name: "sort", "aria-label": "Order" },
          Object.entries(SORTS).map(([name, [label]]) => h("option", { value: name }, label)))),
      h("p", { class: "away", role: "status" }, this.#query ? `${many(found.length, "model")} found` : ""),
      found.length
        ? h("ul", { class: "rows" }, found.slice(0, this.#drawn).map((model) => row(model)))
        : store.models && h("p", { class: "empty" }, this.#query ? `No model matches “${this.#query}”.`
          : this.#only === "not" ? "Every model on disk can be loaded." : "There are no models yet. Download an MLX model with LM Studio, and it appears here."),
      found.length > this.#drawn && h("p", { class: "more muted" }, `${count(found.length - this.#drawn)} more`),
    ];
  }
}

export function abilities(model) {
  const can = model.capabilities ?? {};
  return [can.tools && "tools", can.vision && "images", can.thinking && "thinking"].filter(Boolean);
}

function row(model) {
  const resident = store.resident(model.id);
  const load = resident?.state === "ready" ? null : store.load(model.id);
  const state = load ? "loading" : resident?.state;
  const facts = [
    model.quantization?.name ?? (model.quantization?.bits ? `${model.quantization.bits}-bit` : null),
    model.max_context_length && `${context(model.max_context_length)} context`, model.architecture,
  ].filter(Boolean);
  return h("li", { class: "row", "data-key": model.id },
    h("div", { class: "what" },
      h("h2", {}, h("small", {}, publisher(model.id), publisher(model.id) ? "/" : ""), shortName(model.id),
        state && h("span", { class: `badge ${state}` }, state === "ready" ? "loaded" : state)),
      h("p", { class: "muted" }, facts.join(" · "),
        abilities(model).map((word) => h("span", { class: "tag" }, word))),
      model.reason && h("p", { class: "reason" }, model.reason),
      model.loadable && !model.fits && !resident && h("p", { class: "reason warn" },
        `Needs about ${bytes(model.memory_bytes)}, which is more than is free now.`),
      load && progressBar(load)),
    h("p", { class: "size" }, bytes(model.size_bytes)),
    h("div", { class: "acts" }, actions(model, resident, load)));
}

function actions(model, resident, load) {
  const name = shortName(model.id);
  if (load) return button("cancel", "Cancel", { "data-arg": model.id, "aria-label": `Cancel the load of ${name}` });
  if (resident) {
    return [button("chat", "Chat", { "data-arg": model.id, class: "primary", "aria-label": `Chat with ${name}` }),
      button("unload", "Unload", { "data-arg": model.id, "aria-label": `Unload ${name}` })];
  }
  if (!model.loadable) return null;
  return [button("quick-load", "Load", { "data-arg": model.id, "aria-label": `Load ${name}` }),
    h("button", { type: "button", class: "quiet square", "data-do": "load", "data-arg": model.id,
      "aria-label": `Load ${name} with options`, title: "Load with options" }, icon("tune"))];
}

customElements.define("mlx-models", ModelsView);
