// The clipboard, also where the browser has none for pages (http on the local network).

import { h } from "./dom.js";

export async function copy(text) {
  if (navigator.clipboard && window.isSecureContext) {
    try {
      await navigator.clipboard.writeText(text);
      return true;
    } catch { /* it was not allowed: try the old way */ }
  }
  const area = h("textarea", { class: "away", readonly: true });
  area.value = text;
  document.body.append(area);
  const focused = document.activeElement;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  focused?.focus();
  return done;
}

/** Copy, and say so on the button for a moment. */
export async function copyFrom(control, text) {
  const done = await copy(text);
  const was = control.getAttribute("aria-label") ?? "";
  control.classList.add(done ? "did" : "failed");
  if (was) control.setAttribute("aria-label", done ? "Copied" : "The browser did not allow it");
  setTimeout(() => {
    control.classList.remove("did", "failed");
    if (was) control.setAttribute("aria-label", was);
  }, 1500);
}
