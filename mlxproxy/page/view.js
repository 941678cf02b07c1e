// What all views share: they draw themselves when the store changes, and handle clicks by name.

import { h, morph } from "./dom.js";
import { store } from "./store.js";

export class View extends HTMLElement {
  static events = ["change"];
  #scheduled = false;

  connectedCallback() {
    if (this.isMade) return;
    this.isMade = true;
    this.addEventListener("click", (event) => {
      const control = event.target.closest("[data-do]");
      if (control && this.contains(control) && !control.disabled) {
        this.act(control.dataset.do, control.dataset.arg, control, event);
      }
    });
    for (const name of this.constructor.events) store.addEventListener(name, () => this.draw());
    this.made?.();
    this.draw();
  }

  /** Draw at the next frame, if the view is shown. */
  draw() {
    if (this.#scheduled || this.hidden) return;
    this.#scheduled = true;
    requestAnimationFrame(() => {
      this.#scheduled = false;
      const fresh = h("div", {}, this.render());
      const focused = document.activeElement;
      morph(this, fresh);
      // A browser takes the focus from an element that moves.
      if (focused !== document.activeElement && this.contains(focused)) focused.focus({ preventScroll: true });
    });
  }

  show() {
    this.hidden = false;
    this.draw();
    this.shown?.();
  }

  hide() {
    if (this.hidden) return;
    this.hidden = true;
    this.left?.();
  }

  act() {}
}

/** Tell the user something in a sentence; screen readers read it aloud. */
export function tell(message, kind = "info") {
  document.dispatchEvent(new CustomEvent("tell", { detail: { message, kind } }));
}

/** Await something that may fail, and tell the user why it did; return whether it succeeded. */
export async function attempt(promise, success = "") {
  try {
    await promise;
    if (success) tell(success, "good");
    return true;
  } catch (error) {
    if (error.name !== "AbortError") tell(error.message, "bad");
    return false;
  }
}
