// One message of a conversation.

import { button, h, iconButton } from "./dom.js";
import { rate, seconds, shortName } from "./format.js";
import "./markdown.js";

export class Message extends HTMLElement {
  #message = null;
  #isRunning = false;
  #isQueued = false;

  /** Show a message; `at` is its place in the conversation. */
  set(message, at, isRunning) {
    this.#message = message;
    this.dataset.at = String(at);
    this.className = `message ${message.role}`;
    this.setAttribute("role", "article");
    this.setAttribute("aria-label", message.role === "user" ? "You" : `Answer${message.model ? ` by ${message.model}` : ""}`);
    this.replaceChildren();
    if (message.role === "user") this.#user();
    else this.#assistant();
    this.update(isRunning, true);
    return this;
  }

  #user() {
    const { content, images } = this.#message;
    this.append(h("div", { class: "bubble" },
      images?.length > 0 && h("div", { class: "images" }, images.map((src) => h("img", { src, alt: "Attached image" }))), content),
    h("div", { class: "tools" }, iconButton("edit", "edit", "Edit and ask again"), iconButton("copy-message", "copy", "Copy")));
  }

  #assistant() {
    this.thoughts = h("mlx-markdown");
    this.thinkingLabel = h("summary");
    this.thinkingBox = h("details", { class: "thinking", hidden: true }, this.thinkingLabel, this.thoughts);
    this.status = h("p", { class: "status muted", role: "status" });
    this.answer = h("mlx-markdown");
    this.problem = h("p", { class: "problem", role: "alert" });
    this.figures = h("span", { class: "muted figures" });
    this.tools = h("div", { class: "tools" },
      iconButton("copy-message", "copy", "Copy the answer"), iconButton("again", "again", "Ask again"), this.figures);
    this.append(this.thinkingBox, this.status, this.answer, this.problem, this.tools);
  }

  /** Show what has changed, at the next frame. */
  update(isRunning, now = false) {
    this.#isRunning = isRunning;
    if (this.#message.role === "user") return;
    if (now) this.#draw();
    else if (!this.#isQueued) {
      this.#isQueued = true;
      requestAnimationFrame(() => {
        this.#isQueued = false;
        this.#draw();
        this.dispatchEvent(new Event("grown", { bubbles: true }));
      });
    }
  }

  #draw() {
    const message = this.#message;
    const isThinking = this.#isRunning && message.thinking && !message.content;
    this.thinkingBox.hidden = !message.thinking;
    this.thinkingLabel.textContent = isThinking ? "Thinking…"
      : `Thought${message.thinkingSeconds ? ` for ${seconds(message.thinkingSeconds)}` : ""}`;
    this.thoughts.text = message.thinking ?? "";
    this.answer.text = message.content;
    this.classList.toggle("running", this.#isRunning);
    const idle = this.#isRunning && !message.content && !message.thinking ? "Waiting for the first token…" : "";
    this.status.textContent = (this.#isRunning && message.status) || idle;
    this.status.hidden = !this.status.textContent;
    this.problem.replaceChildren(...[message.error, message.error && " ", message.error && button("again", "Try again")].filter(Boolean));
    this.problem.hidden = !message.error;
    this.tools.hidden = this.#isRunning;
    this.figures.textContent = figures(message);
  }
}

function figures(message) {
  const { stats, model, asked, finish, isStopped, warning } = message;
  return [
    model && shortName(model), asked && model && asked !== model && `instead of ${shortName(asked)}`,
    stats?.rate && `${rate(stats.rate)} tokens/s`, stats && `${stats.tokens} tokens`,
    stats && `first after ${seconds(stats.first)}`,
    isStopped && "stopped", finish === "length" && "cut off at the limit of tokens", warning,
  ].filter(Boolean).join(" · ");
}

customElements.define("mlx-message", Message);
