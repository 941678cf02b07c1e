// The key: asked for when the server wants one, and kept in this browser only.

import { api, ApiError } from "./api.js";
import { dialog, field } from "./dialog.js";
import { h } from "./dom.js";

let shown = null;

export function keyDialog() {
  if (shown?.isConnected) return;
  shown = dialog({
    title: "API key",
    confirm: "Use this key",
    closable: Boolean(api.key),
    body: [
      h("p", { class: "muted" }, "This server asks for a key (its setting API_KEY). It is kept in this browser, and sent to this server only."),
      field("Key", h("input", { type: "password", name: "key", required: true, autocomplete: "current-password", spellcheck: "false" })),
    ],
    async submit(form) {
      const key = form.get("key").trim();
      const answer = await fetch("/v1/models/loaded", { cache: "no-store", headers: { Authorization: `Bearer ${key}` } });
      if (answer.status === 401) throw new ApiError("This key is not valid here.");
      if (!answer.ok) throw new ApiError(`mlxproxy answered with status ${answer.status}. Try again.`);
      api.key = key;
    },
  });
}
