// A load with options.

import { api } from "./api.js";
import { choice, dialog, field } from "./dialog.js";
import { h } from "./dom.js";
import { bytes, shortName } from "./format.js";

export function loadDialog(model) {
  const can = model.capabilities;
  dialog({
    title: `Load ${shortName(model.id)}`,
    confirm: "Load",
    body: [
      h("p", { class: "muted" }, `Takes about ${bytes(model.memory_bytes)} of memory`,
        model.fits ? "." : ", which is more than is free now. Other models may be unloaded for it."),
      can.thinking && field("Thinking", choice("thinking", [["", "As set for the model"], ["true", "On"], ["false", "Off"]], ""),
        "The default for requests that do not say."),
      field("Unload when unused for", choice("ttl", [["", "As set for the model"], ["5m", "5 minutes"], ["30m", "30 minutes"], ["2h", "2 hours"], ["0", "Never"]], "")),
      h("label", { class: "check" }, h("input", { type: "checkbox", name: "pin" }),
        h("span", {}, "Pin it: never unload it for another model")),
      h("label", { class: "check" }, h("input", { type: "checkbox", name: "force" }),
        h("span", {}, "Load it even if memory seems too small")),
    ],
    async submit(form) {
      const body = { model_id: model.id, wait: false };
      if (form.get("thinking")) body.enable_thinking = form.get("thinking") === "true";
      if (form.get("ttl")) body.ttl = form.get("ttl");
      if (form.has("pin")) body.pin = true;
      if (form.has("force")) body.force = true;
      await api.json("/v1/models/load", { method: "POST", body });
    },
  });
}
