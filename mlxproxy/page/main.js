// The page: its parts, which one is shown, the state of the connection, and messages to the user.

import { api } from "./api.js";
import "./chat-view.js";
import "./connect-view.js";
import { h, icon } from "./dom.js";
import { shortName } from "./format.js";
import { keyDialog } from "./key-dialog.js";
import "./logs-view.js";
import "./models-view.js";
import "./now-view.js";
import { store } from "./store.js";

const VIEWS = { now: "Now", models: "Models", chat: "Chat", logs: "Logs", connect: "Connect" };
const PHASES = {
  connecting: "Connecting…", live: "Connected", lost: "No connection. Trying again…", keyless: "A key is needed",
};
const TOLD_MS = 6000;

class App extends HTMLElement {
  connectedCallback() {
    this.dot = h("span", { class: "connection", role: "status" });
    this.main = h("main", { id: "main", tabindex: "-1" },
      Object.keys(VIEWS).map((name) => h(`mlx-${name}`, { hidden: true, class: "view" })));
    this.toasts = h("div", { class: "toasts", role: "status", "aria-live": "polite" });
    this.links = Object.entries(VIEWS).map(([name, label]) => h("a", { href: `#${name}` }, icon(name), h("span", {}, label)));
    const skip = h("a", { href: "#main", class: "skip" }, "Skip to the content");
    skip.addEventListener("click", (event) => { event.preventDefault(); this.main.focus(); });
    this.append(skip,
      h("nav", { "aria-label": "Parts" }, h("div", { class: "brand" }, "mlxproxy"), this.links, this.dot),
      this.main, this.toasts);
    window.addEventListener("hashchange", () => this.#route());
    document.addEventListener("tell", ({ detail }) => this.#tell(detail.message, detail.kind));
    document.addEventListener("chat-with", ({ detail }) => { location.hash = "chat"; this.querySelector("mlx-chat").with(detail); });
    api.addEventListener("keyless", () => keyDialog());
    store.addEventListener("phase", ({ detail }) => this.#phase(detail));
    store.addEventListener("failure", ({ detail }) => this.#tell(detail.reason, "bad"));
    store.addEventListener("loaded", ({ detail }) => this.#tell(`${shortName(detail.id)} is loaded.`, "good"));
    this.#phase({ phase: "connecting" });
    this.#route();
    store.start();
  }

  #route() {
    const wanted = location.hash.slice(1);
    const name = wanted in VIEWS ? wanted : "now";
    for (const view of this.main.children) {
      if (view.localName === `mlx-${name}`) view.show();
      else view.hide();
    }
    for (const link of this.links) {
      if (link.getAttribute("href") === `#${name}`) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
    }
    document.title = `${VIEWS[name]} – mlxproxy`;
    document.body.dataset.view = name;
  }

  #phase({ phase, was }) {
    this.dot.className = `connection ${phase}`;
    this.dot.textContent = phase === "lost" && store.problem ? store.problem : PHASES[phase];
    document.body.dataset.phase = phase;
    if (phase === "live" && was === "lost") {
      this.#tell("The connection is back.", "good");
      this.#checkVersion();
    }
  }

  /** Say so if the proxy that came back has another page than this one. */
  async #checkVersion() {
    try {
      const answer = await fetch("/", { method: "HEAD", cache: "no-store", headers: { Accept: "text/html" } });
      const digest = answer.headers.get("ETag")?.replaceAll('"', "");
      if (digest && !import.meta.url.includes(digest)) this.#tell("mlxproxy has been updated. Reload this page.");
    } catch { /* it is gone again */ }
  }

  #tell(message, kind) {
    const toast = h("p", { class: `toast ${kind}` }, message);
    this.toasts.append(toast);
    while (this.toasts.childElementCount > 3) this.toasts.firstElementChild.remove();
    setTimeout(() => toast.remove(), TOLD_MS + 40 * message.length);
  }
}

customElements.define("mlx-app", App);
