// A modal dialog with a form. The browser keeps the focus in it and closes it with Escape.

import { h, iconButton } from "./dom.js";

/**
 * Show a form; call `submit` with its FormData, and close unless that throws or returns false.
 * Return the dialog.
 */
export function dialog({ title, body, confirm, submit, closable = true }) {
  const problem = h("p", { class: "problem", role: "alert" });
  const go = h("button", { class: "primary" }, confirm);
  const form = h("form", { method: "dialog" },
    h("header", {}, h("h2", { id: "dialog-title" }, title), closable && iconButton("close", "close", "Close")),
    h("div", { class: "fields" }, body), problem,
    h("footer", {}, closable && h("button", { type: "button", "data-do": "close" }, "Cancel"), go));
  const box = h("dialog", { "aria-labelledby": "dialog-title" }, form);
  box.addEventListener("click", (event) => {
    if (event.target.closest('[data-do="close"]') || (closable && event.target === box)) box.close();
  });
  box.addEventListener("cancel", (event) => { if (!closable) event.preventDefault(); });
  box.addEventListener("close", () => box.remove());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    go.disabled = true;
    problem.textContent = "";
    try {
      if ((await submit(new FormData(form), box)) !== false) box.close();
    } catch (error) {
      problem.textContent = error.message;
    } finally {
      go.disabled = false;
    }
  });
  document.body.append(box);
  box.showModal();
  return box;
}

export const field = (label, control, help) =>
  h("label", { class: "field" }, h("span", {}, label), control, help && h("small", { class: "muted" }, help));

export const choice = (name, options, value) =>
  h("select", { name }, options.map(([key, label]) => h("option", { value: key, selected: key === value }, label)));
