// Chat: conversations with the models on this machine.

import { ask } from "./answer.js";
import { all, forget, fresh, keep } from "./conversations.js";
import { copyFrom } from "./copy.js";
import { choice, dialog, field } from "./dialog.js";
import { h, icon, iconButton } from "./dom.js";
import { shortName } from "./format.js";
import "./message.js";
import { abilities } from "./models-view.js";
import { store } from "./store.js";
import { tell } from "./view.js";

const SAVE_MS = 2000; // between two saves while an answer comes
const IMAGE_BYTES = 20e6;
const IMAGE_TYPES = ["image/png", "image/jpeg", "image/gif", "image/webp"];

class ChatView extends HTMLElement {
  #conversations = [];
  #current = fresh();
  #runs = new Map(); // by the conversation's id: {controller, message}
  #images = [];
  #isAtEnd = true;

  connectedCallback() {
    if (this.list) return;
    this.picker = h("select", { "aria-label": "Model", name: "model" });
    this.log = h("div", { class: "messages", role: "log", "aria-label": "Conversation", tabindex: "0" });
    this.text = h("textarea", { name: "text", rows: 1, placeholder: "Ask something", "aria-label": "Message" });
    this.list = h("ul", { class: "conversations" });
    this.note = h("p", { class: "note muted", role: "status" });
    this.thumbs = h("div", { class: "images" });
    this.attach = h("label", { class: "quiet square attach", title: "Attach images" }, icon("image"),
      h("input", { type: "file", accept: IMAGE_TYPES.join(), multiple: true, class: "away", "aria-label": "Attach images" }));
    this.send = h("button", { class: "primary square", "data-do": "send", type: "button", "aria-label": "Send" }, icon("send"));
    this.stop = h("button", { class: "square", "data-do": "stop", type: "button", "aria-label": "Stop the answer" }, icon("stop"));
    this.append(
      h("aside", { "aria-label": "Conversations" },
        h("header", {}, h("h2", {}, "Conversations"), iconButton("new", "plus", "New conversation")), this.list,
        h("p", { class: "muted" }, "Kept in this browser only.")),
      h("div", { class: "talk" },
        h("header", { class: "bar" }, h("h1", { class: "away" }, "Chat"),
          iconButton("list", "list", "Conversations", { class: "narrow", "aria-expanded": "false" }), this.picker,
          iconButton("settings", "tune", "System prompt and sampling"), iconButton("new", "plus", "New conversation", { class: "narrow" })),
        this.log,
        h("div", { class: "composer" }, this.note, this.thumbs,
          h("div", { class: "box" }, this.attach, this.text, this.stop, this.send))));
    this.#listen();
    this.#restore();
  }

  show() {
    this.hidden = false;
    this.#models();
    if (matchMedia("(pointer: fine)").matches) this.text.focus();
  }

  hide() { this.hidden = true; }

  /** Begin a conversation with that model. */
  with(model) {
    if (this.#current.messages.length) this.#open(fresh({ system: this.#current.system, sampling: this.#current.sampling }));
    this.#current.model = model;
    this.#models();
  }

  // -- what happens

  #listen() {
    this.addEventListener("click", (event) => {
      const control = event.target.closest("[data-do]");
      if (control) this.#act(control.dataset.do, control);
    });
    this.text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#send();
      }
    });
    this.text.addEventListener("input", () => this.#fit());
    this.picker.addEventListener("change", () => { this.#current.model = this.picker.value; this.#models(); this.#save(this.#current); });
    this.attach.querySelector("input").addEventListener("change", (event) => {
      this.#addImages([...event.target.files]);
      event.target.value = "";
    });
    this.text.addEventListener("paste", (event) => this.#addImages([...event.clipboardData.files], event));
    this.addEventListener("dragover", (event) => event.preventDefault());
    this.addEventListener("drop", (event) => { event.preventDefault(); this.#addImages([...event.dataTransfer.files]); });
    this.log.addEventListener("scroll", () => {
      this.#isAtEnd = this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < 60;
    }, { passive: true });
    this.log.addEventListener("grown", () => this.#follow());
    store.addEventListener("change", () => { if (!this.hidden) this.#models(); });
  }

  #act(action, control) {
    const at = Number(control.closest("mlx-message")?.dataset.at);
    const messages = this.#current.messages;
    if (action === "send") this.#send();
    else if (action === "stop") this.#runs.get(this.#current.id)?.controller.abort();
    else if (action === "new") this.#open(fresh({ model: this.#current.model }));
    else if (action === "open") this.#open(this.#conversations.find((each) => each.id === control.dataset.arg));
    else if (action === "forget") this.#forget(control.dataset.arg);
    else if (action === "list") this.#drawer(!this.classList.contains("open"));
    else if (action === "settings") this.#settings();
    else if (action === "copy-code") copyFrom(control, control.closest("figure").querySelector("code").textContent);
    else if (action === "copy-message") copyFrom(control, messages[at].content);
    else if (action === "again") this.#askAgain(at);
    else if (action === "edit") this.#edit(at);
    else if (action === "drop-image") { this.#images.splice(Number(control.dataset.arg), 1); this.#showImages(); }
  }

  #send() {
    const content = this.text.value.trim();
    if ((!content && !this.#images.length) || this.#runs.has(this.#current.id)) return;
    const message = { role: "user", content };
    if (this.#images.length) message.images = this.#images;
    this.#images = [];
    this.#showImages();
    this.text.value = "";
    this.#fit();
    const conversation = this.#current;
    if (!conversation.title) conversation.title = content.slice(0, 60) || "Image";
    conversation.messages.push(message);
    this.#show(message, conversation.messages.length - 1, false);
    this.#run(conversation);
  }

  async #run(conversation) {
    const message = { role: "assistant", content: "", asked: conversation.model };
    const asked = [...conversation.messages];
    conversation.messages.push(message);
    conversation.used = Date.now();
    const controller = new AbortController();
    this.#runs.set(conversation.id, { controller, message });
    this.#isAtEnd = true;
    if (conversation === this.#current) this.#show(message, asked.length, true);
    this.#save(conversation);
    this.#changed();
    let saved = performance.now();
    try {
      await ask(conversation, asked, message, () => {
        this.#elementOf(conversation, message)?.update(true);
        if (performance.now() - saved > SAVE_MS) {
          saved = performance.now();
          this.#save(conversation);
        }
      }, controller.signal);
    } catch (error) {
      if (error.name === "AbortError") message.isStopped = true;
      else message.error = error.message;
    }
    this.#runs.delete(conversation.id);
    this.#elementOf(conversation, message)?.update(false);
    this.#save(conversation);
    this.#changed();
  }

  #askAgain(at) {
    const conversation = this.#current;
    if (this.#runs.has(conversation.id)) return;
    conversation.messages.length = at;
    this.#redraw();
    this.#run(conversation);
  }

  #edit(at) {
    const conversation = this.#current;
    if (this.#runs.has(conversation.id)) return;
    const message = conversation.messages[at];
    dialog({
      title: "Edit the message",
      confirm: "Ask again",
      body: [h("p", { class: "muted" }, "What came after it is replaced."),
        field("Message", h("textarea", { name: "content", rows: 6 }, message.content))],
      submit: (form) => {
        conversation.messages.length = at + 1;
        conversation.messages[at] = { ...message, content: form.get("content").trim() };
        this.#redraw();
        this.#run(conversation);
      },
    });
  }

  #settings() {
    const conversation = this.#current;
    const { thinking, ...sampling } = conversation.sampling;
    const number = (name, attributes) => h("input", { type: "number", name, value: sampling[name], placeholder: "As set for the model", ...attributes });
    dialog({
      title: "This conversation",
      confirm: "Save",
      body: [
        field("System prompt", h("textarea", { name: "system", rows: 4 }, conversation.system)),
        field("Temperature", number("temperature", { min: 0, max: 2, step: 0.05 })),
        field("Top p", number("top_p", { min: 0.01, max: 1, step: 0.01 })),
        field("Longest answer, in tokens", number("max_tokens", { min: 1, step: 1 })),
        field("Thinking", choice("thinking", [["", "As loaded"], ["true", "On"], ["false", "Off"]], thinking === undefined ? "" : String(thinking)), "Only for models that can think."),
      ],
      submit: (form) => {
        conversation.system = form.get("system").trim();
        conversation.sampling = {};
        for (const name of ["temperature", "top_p", "max_tokens"]) {
          if (form.get(name) !== "") conversation.sampling[name] = Number(form.get(name));
        }
        if (form.get("thinking")) conversation.sampling.thinking = form.get("thinking") === "true";
        this.#save(conversation);
      },
    });
  }

  // -- conversations

  async #restore() {
    this.#conversations = await all();
    if (!this.#current.messages.length && this.#conversations.length) {
      this.#open({ ...this.#conversations[0], model: this.#current.model ?? this.#conversations[0].model });
    } else {
      this.#redraw();
      this.#changed();
    }
  }

  #open(conversation) {
    this.#conversations = this.#conversations.map((each) => (each.id === conversation.id ? conversation : each));
    this.#current = conversation;
    this.#drawer(false);
    this.#redraw();
    this.#models();
    this.#changed();
    if (!this.hidden && matchMedia("(pointer: fine)").matches) this.text.focus();
  }

  async #save(conversation) {
    if (!conversation.messages.length) return;
    if (!this.#conversations.includes(conversation)) this.#conversations = [conversation, ...this.#conversations];
    if (!(await keep(conversation)) && !this.told) {
      this.told = true;
      tell("This browser keeps no data for this page: conversations are lost when it is closed.", "bad");
    }
  }

  #forget(id) {
    this.#runs.get(id)?.controller.abort();
    this.#conversations = this.#conversations.filter((each) => each.id !== id);
    forget(id);
    if (this.#current.id === id) this.#open(this.#conversations[0] ?? fresh({ model: this.#current.model }));
    else this.#changed();
  }

  // -- what is shown

  #elementOf(conversation, message) {
    if (conversation !== this.#current) return null;
    return this.log.querySelector(`mlx-message[data-at="${conversation.messages.indexOf(message)}"]`);
  }

  #show(message, at, isRunning) {
    this.log.querySelector(".empty")?.remove();
    this.log.append(document.createElement("mlx-message").set(message, at, isRunning));
    this.#follow(true);
  }

  #redraw() {
    const running = this.#runs.get(this.#current.id)?.message;
    this.log.replaceChildren(...this.#current.messages.map((message, at) =>
      document.createElement("mlx-message").set(message, at, message === running)));
    if (!this.#current.messages.length) this.log.append(h("p", { class: "empty" }, "Nothing leaves this machine but what you send to it."));
    this.#isAtEnd = true;
    this.#follow();
  }

  #follow(always = false) {
    if (always || this.#isAtEnd) this.log.scrollTop = this.log.scrollHeight;
  }

  #changed() {
    const isRunning = this.#runs.has(this.#current.id);
    this.stop.hidden = !isRunning;
    this.send.hidden = isRunning;
    this.list.replaceChildren(...this.#conversations.map((each) => h("li", {},
      h("button", { type: "button", "data-do": "open", "data-arg": each.id, "aria-current": each.id === this.#current.id ? "true" : null },
        h("span", {}, each.title || "Untitled"), this.#runs.has(each.id) && h("span", { class: "pulse", "aria-label": "is being answered" })),
      iconButton("forget", "bin", `Delete “${each.title || "Untitled"}”`, { "data-arg": each.id }))));
  }

  #models() {
    const usable = (store.models ?? []).filter((model) => model.loadable);
    const loaded = store.residents.filter((model) => model.state === "ready").map((model) => model.id);
    const isKnown = usable.some((model) => model.id === this.#current.model);
    if (store.models && !isKnown) this.#current.model = loaded[0] ?? usable[0]?.id ?? null;
    const key = [store.models === this.seen, loaded.join(), this.#current.model].join();
    if (this.drawn === key) return;
    this.seen = store.models;
    this.drawn = ["true", loaded.join(), this.#current.model].join();
    const group = (label, ids) => ids.length > 0 && h("optgroup", { label },
      ids.map((id) => h("option", { value: id, selected: id === this.#current.model }, id)));
    const others = usable.map((model) => model.id).filter((id) => !loaded.includes(id));
    this.picker.replaceChildren(...[group("Loaded", loaded), group("On disk", others)].filter(Boolean));
    if (this.#current.model) this.picker.value = this.#current.model;
    const model = store.model(this.#current.model);
    const sees = Boolean(model && abilities(model).includes("images"));
    this.attach.hidden = !sees;
    if (!sees && this.#images.length) { this.#images = []; this.#showImages(); }
    this.note.textContent = !store.models ? "" : !model ? "There is no model to chat with yet."
      : loaded.includes(model.id) ? "" : `${shortName(model.id)} is not loaded: your message loads it${loaded.length ? ", and may unload another" : ""}.`;
    this.note.hidden = !this.note.textContent;
  }

  #drawer(isOpen) {
    this.classList.toggle("open", isOpen);
    this.querySelector('[data-do="list"]').setAttribute("aria-expanded", String(isOpen));
  }

  #fit() {
    this.text.rows = Math.min(10, Math.max(1, this.text.value.split("\n").length, Math.ceil(this.text.value.length / 90)));
  }

  async #addImages(files, event) {
    const images = files.filter((file) => file.type.startsWith("image/"));
    if (!images.length) return;
    event?.preventDefault();
    if (this.attach.hidden) {
      tell(`${shortName(this.#current.model)} cannot see images.`, "bad");
      return;
    }
    for (const file of images) {
      if (!IMAGE_TYPES.includes(file.type) || file.size > IMAGE_BYTES) {
        tell(`${file.name} cannot be sent: images are PNG, JPEG, GIF or WebP of at most 20 MB.`, "bad");
      } else {
        this.#images.push(await dataUrl(file));
      }
    }
    this.#showImages();
  }

  #showImages() {
    this.thumbs.replaceChildren(...this.#images.map((src, at) => h("span", {}, h("img", { src, alt: `Image ${at + 1}` }),
      iconButton("drop-image", "close", `Remove image ${at + 1}`, { "data-arg": at }))));
  }
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}

customElements.define("mlx-chat", ChatView);
