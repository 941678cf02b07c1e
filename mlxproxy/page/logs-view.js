// Logs: the proxy's and the backends', as they are written.

import { api } from "./api.js";
import { button, h } from "./dom.js";
import { store } from "./store.js";
import { View, tell } from "./view.js";

const KEPT = 3000; // lines
const LINES = 400; // that the server sends first

class LogsView extends View {
  static events = ["phase"];
  #source = "proxy";
  #lines = [];
  #filter = "";
  #isPaused = false;
  #pending = 0;
  #controller = null;
  #list = h("div", { class: "log", "data-opaque": "", tabindex: "0", role: "log", "aria-label": "Log lines", "aria-live": "off" });
  #isAtEnd = true;

  made() {
    this.#list.addEventListener("scroll", () => {
      const { scrollHeight, scrollTop, clientHeight } = this.#list;
      this.#isAtEnd = scrollHeight - scrollTop - clientHeight < 40;
    }, { passive: true });
    this.addEventListener("input", (event) => {
      if (event.target.name === "source") {
        this.#source = event.target.value;
        this.#follow();
      } else if (event.target.name === "filter") {
        this.#filter = event.target.value.toLowerCase();
        this.#redraw();
      }
    });
    store.addEventListener("phase", ({ detail }) => {
      if (detail.phase === "live" && !this.hidden) this.#follow();
    });
  }

  shown() { this.#follow(); }
  left() { this.#controller?.abort(); }

  act(action) {
    if (action === "pause") {
      this.#isPaused = !this.#isPaused;
      this.#pending = 0;
      if (!this.#isPaused) this.#redraw();
    } else if (action === "clear") {
      this.#lines = [];
      this.#redraw();
    }
    this.draw();
  }

  async #follow() {
    this.#controller?.abort();
    const controller = this.#controller = new AbortController();
    this.#lines = [];
    this.#redraw();
    const [source, port] = this.#source.split(":");
    const path = `/v1/logs?source=${source}&lines=${LINES}&follow=true${port ? `&port=${port}` : ""}`;
    try {
      for await (const { data } of api.stream(path, { signal: controller.signal })) {
        if (data !== undefined) this.#add(data.split("\n"));
      }
    } catch (error) {
      if (error.name !== "AbortError" && error.status) tell(error.message, "bad");
    }
  }

  #add(lines) {
    this.#lines.push(...lines);
    if (this.#lines.length > KEPT) this.#lines.splice(0, this.#lines.length - KEPT);
    if (this.#isPaused) {
      this.#pending += lines.length;
      this.draw();
    } else {
      this.#show(lines);
    }
  }

  #show(lines) {
    const list = this.#list;
    list.append(...lines.filter((line) => this.#matches(line)).map(entry));
    while (list.childElementCount > KEPT) list.firstElementChild.remove();
    if (this.#isAtEnd) requestAnimationFrame(() => { list.scrollTop = list.scrollHeight; });
  }

  #redraw() {
    this.#list.replaceChildren();
    this.#isAtEnd = true;
    this.#show(this.#lines);
  }

  #matches(line) {
    return !this.#filter || line.toLowerCase().includes(this.#filter);
  }

  render() {
    const ports = store.residents.map((model) => model.port).filter(Boolean);
    const sources = [["proxy", "mlxproxy"], ...(ports.length > 1
      ? store.residents.filter((model) => model.port).map((model) => [`backend:${model.port}`, `Backend of ${model.id}`])
      : [["backend", "Backend"]])];
    return [
      h("header", { class: "top" }, h("h1", {}, "Logs")),
      h("div", { class: "filters" },
        h("select", { name: "source", "aria-label": "Which log" }, sources.map(([value, label]) => h("option", { value }, label))),
        h("input", { type: "search", name: "filter", placeholder: "Show lines with…", "aria-label": "Show lines with", spellcheck: "false" }),
        button("pause", this.#isPaused ? `Follow${this.#pending ? ` (${this.#pending} new)` : ""}` : "Pause", { "aria-pressed": String(this.#isPaused) }),
        button("clear", "Clear", { class: "quiet" })),
      this.contains(this.#list) ? h("div", { class: "log", "data-opaque": "", tabindex: "0", role: "log", "aria-label": "Log lines", "aria-live": "off" }) : this.#list,
    ];
  }
}

function entry(line) {
  const level = /\b(ERROR|CRITICAL|WARNING)\b/.exec(line)?.[1];
  return h("p", { class: level ? (level === "WARNING" ? "warn" : "bad") : null }, line);
}

customElements.define("mlx-logs", LogsView);
