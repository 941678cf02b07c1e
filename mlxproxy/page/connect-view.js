// Connect: this server's address, as text and as a QR code, and the lines for each client.

import { api } from "./api.js";
import { clients } from "./clients.js";
import { copyFrom } from "./copy.js";
import { button, h, icon, svg } from "./dom.js";
import { keyDialog } from "./key-dialog.js";
import { store } from "./store.js";
import { View, attempt } from "./view.js";

const HIDDEN_KEY = "••••••••";

class ConnectView extends View {
  #reachable = null;
  #url = null;
  #model = null;

  made() {
    this.addEventListener("input", (event) => {
      if (event.target.name === "address") this.#url = event.target.value;
      else if (event.target.name === "model") this.#model = event.target.value;
      this.draw();
    });
  }

  shown() {
    attempt(api.json("/v1/addresses").then((found) => { this.#reachable = found; this.draw(); }));
  }

  act(action, arg, control) {
    if (action === "copy-lines") {
      const found = clients(this.#facts(true)).find((client) => client.name === arg);
      copyFrom(control, found.lines);
    } else if (action === "copy-url") copyFrom(control, `${this.#facts().url}/v1`);
    else if (action === "key") keyDialog();
  }

  #addresses() {
    const own = location.origin;
    const found = this.#reachable?.data ?? [];
    return found.some((each) => each.url === own) ? found : [...found, { url: own, qr: null }];
  }

  #facts(open = false) {
    const all = this.#addresses();
    const url = this.#url ?? (isLocal() ? all[0].url : location.origin);
    const usable = (store.models ?? []).filter((model) => model.loadable);
    const model = this.#model ?? store.residents[0]?.id ?? usable[0]?.id ?? "MODEL";
    const key = !api.key ? "none" : open ? api.key : HIDDEN_KEY;
    return { url, model, key };
  }

  render() {
    const facts = this.#facts();
    const all = this.#addresses();
    const chosen = all.find((each) => each.url === facts.url);
    const usable = (store.models ?? []).filter((model) => model.loadable);
    return [
      h("header", { class: "top" }, h("h1", {}, "Connect"),
        h("p", { class: "muted" }, "Any program that speaks the API of OpenAI, Anthropic, Ollama or LM Studio can use these models.")),
      h("section", { class: "card address", "aria-label": "Address" },
        h("div", {},
          h("p", { class: "muted" }, "Base URL"),
          h("p", { class: "url" }, h("code", {}, `${facts.url}/v1`),
            h("button", { type: "button", "data-do": "copy-url", "aria-label": "Copy the base URL", class: "quiet" }, icon("copy"), "Copy")),
          h("p", { class: "muted" }, this.#reachable === null ? ""
            : !this.#reachable.data.length ? "Only this machine can reach the server (PROXY_HOST)."
              : this.#reachable.key_required ? "A key is required. "
                : "No key is required: anyone on your network can use this server. ",
          api.key ? [h("span", {}, "This browser has a key; copying puts it in place of the dots. "), button("key", "Change it", { class: "quiet" })] : null),
          h("div", { class: "filters" },
            all.length > 1 && h("label", { class: "field" }, h("span", {}, "Address"),
              h("select", { name: "address" }, all.map(({ url }) => h("option", { value: url, selected: url === facts.url }, url)))),
            h("label", { class: "field" }, h("span", {}, "Model"),
              h("select", { name: "model" }, usable.slice(0, 500).map(({ id }) => h("option", { value: id, selected: id === facts.model }, id)))))),
        chosen?.qr && h("figure", { class: "qr" }, qrCode(chosen), h("figcaption", { class: "muted" }, "This page on your phone"))),
      h("section", { "aria-labelledby": "clients" }, h("h2", { id: "clients" }, "Clients"),
        h("div", { class: "clients" }, clients(facts).map((client) =>
          h("details", { class: "card", "data-key": client.name },
            h("summary", {}, client.name),
            h("figure", { class: "code" },
              h("figcaption", {}, h("span", {}, client.where), h("button", { type: "button", class: "quiet", "data-do": "copy-lines",
                "data-arg": client.name, "aria-label": `Copy the lines for ${client.name}` }, icon("copy"), "Copy")),
              h("pre", { tabindex: "0" }, h("code", {}, client.lines))))))),
    ];
  }
}

const isLocal = () => ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);

function qrCode({ url, qr }) {
  const size = qr.length + 8; // with the quiet zone
  const path = qr.flatMap((row, y) => [...row].map((bit, x) => (bit === "1" ? `M${x + 4} ${y + 4}h1v1h-1z` : "")));
  return svg("svg", { viewBox: `0 0 ${size} ${size}`, role: "img", "aria-label": `QR code of ${url}`, "shape-rendering": "crispEdges" },
    svg("rect", { width: size, height: size, fill: "#fff" }), svg("path", { d: path.join(""), fill: "#000" }));
}

customElements.define("mlx-connect", ConnectView);
