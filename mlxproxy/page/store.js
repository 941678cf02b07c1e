// What the proxy is doing, from one stream of events. Every connection begins with the whole state,
// so nothing that was missed leaves it wrong.

import { api } from "./api.js";

const RETRY_MS = [250, 500, 1000, 2000];
const HIDDEN_MS = 60_000; // after which a page that nobody sees follows nothing
const SILENCE_MS = 40_000; // more than two of the server's keepalives
const MODELS_MS = 120_000; // between two looks at what is on disk
const SAMPLES = 300; // seconds that the curves show
const KEPT = 30; // of the last answers and failures

class Store extends EventTarget {
  phase = "connecting"; // or live, lost, keyless
  problem = null; // why the connection is lost, if the proxy has said so
  state = null;
  models = null; // as in /v1/models?all=true; null: not read yet
  complete = true;
  modelsError = null;
  recent = []; // the last answers, the newest first
  failures = [];
  samples = []; // {speed, first, models: {id: speed}} for each second
  #loads = new Map();
  #firsts = [];
  #controller = null;
  #figuresAt = 0;
  #ahead = 0;
  #wake = () => {};

  start() {
    api.addEventListener("key", () => { this.#again(); this.readModels(); });
    let timer;
    document.addEventListener("visibilitychange", () => {
      clearTimeout(timer);
      if (document.hidden) timer = setTimeout(() => this.#controller?.abort(), HIDDEN_MS);
      else { this.#wake(); this.readModels(); }
    });
    window.addEventListener("online", () => this.#wake());
    setInterval(() => this.#sample(), 1000);
    setInterval(() => { if (!document.hidden) this.readModels(); }, MODELS_MS);
    this.#follow();
    this.readModels();
  }

  get isLive() { return this.phase === "live"; }
  get residents() { return this.state?.models ?? []; }
  get answers() { return this.state?.answers ?? []; }
  get loads() { return [...this.#loads.values()]; }

  resident(id) { return this.residents.find((model) => model.id === id); }
  load(id) { return this.#loads.get(id); }
  model(id) { return this.models?.find((model) => model.id === id); }

  async readModels() {
    if (this.phase === "keyless") return;
    try {
      const found = await api.json("/v1/models?all=true");
      this.models = found.data;
      this.complete = found.complete;
      this.modelsError = null;
      if (!found.complete) setTimeout(() => this.readModels(), 1000);
    } catch (error) {
      this.modelsError = error.message;
    }
    this.#changed();
  }

  async #follow() {
    let failed = 0;
    for (;;) {
      this.#controller = new AbortController();
      let watch;
      const alive = () => {
        clearTimeout(watch);
        watch = setTimeout(() => this.#controller.abort(), SILENCE_MS);
      };
      try {
        alive();
        const options = { signal: this.#controller.signal };
        for await (const { event, data } of api.stream("/v1/events?figures=true", options)) {
          alive();
          if (!event) continue;
          failed = 0;
          this.#take(event, JSON.parse(data));
        }
        this.#enter("lost");
      } catch (error) {
        this.problem = error.status ? error.message : null; // or else nothing has answered
        this.#enter(error.status === 401 ? "keyless" : "lost");
      }
      clearTimeout(watch);
      if (this.phase === "keyless" || document.hidden) await this.#sleep(null);
      else await this.#sleep(RETRY_MS[Math.min(failed++, RETRY_MS.length - 1)]);
    }
  }

  /** Wait for that long (null: for ever), or until something suggests another try. */
  #sleep(ms) {
    return new Promise((resolve) => {
      const timer = ms === null ? null : setTimeout(resolve, ms);
      this.#wake = () => { clearTimeout(timer); resolve(); };
    });
  }

  #again() {
    this.#enter("connecting");
    this.#controller?.abort();
    this.#wake();
  }

  #enter(phase) {
    if (this.phase === phase) return;
    const was = this.phase;
    this.phase = phase;
    if (phase === "live" && was !== "connecting") this.readModels();
    this.dispatchEvent(new CustomEvent("phase", { detail: { phase, was } }));
    this.#changed();
  }

  /** The server's time in Unix seconds: another machine's clock may differ. */
  get time() { return Date.now() / 1000 + this.#ahead; }

  #take(kind, data) {
    this.#ahead = data.at - Date.now() / 1000;
    const before = this.residents.map((model) => model.id + model.state).join();
    if (kind === "snapshot") {
      this.state = data;
      this.#setLoads(data.operations);
      this.#noteFailure(data.last_failure);
      this.#figuresAt = performance.now();
      this.#enter("live");
    } else if (kind === "state") {
      this.state = { ...this.state, ...data };
      if (!data.transition) this.#loads.clear();
      this.#noteFailure(data.last_failure);
    } else if (kind === "figures") {
      const { models, operations, ...rest } = data;
      const figures = new Map(models.map((model) => [model.slot, model]));
      const residents = this.residents.map((model) => ({ ...model, ...figures.get(model.slot) }));
      this.state = { ...this.state, ...rest, models: residents };
      this.#setLoads(operations);
      this.#figuresAt = performance.now();
    } else if (kind === "load" && data.id) {
      this.#loads.set(data.id, { ...this.#loads.get(data.id), ...data });
    } else if (kind === "loaded") {
      this.#loads.delete(data.id);
      this.dispatchEvent(new CustomEvent("loaded", { detail: data }));
    } else if (kind === "request") {
      if (data.model || data.outcome) this.#noteAnswer(data);
    }
    if (this.models && before !== this.residents.map((model) => model.id + model.state).join()) {
      this.readModels(); // what fits has changed
    }
    this.#changed();
  }

  #setLoads(operations) {
    const loads = operations.filter((each) => each.kind === "load");
    this.#loads = new Map(loads.map((each) => [each.id, { ...this.#loads.get(each.id), ...each }]));
  }

  #noteAnswer(data) {
    this.recent = [data, ...this.recent].slice(0, KEPT);
    if (data.first_token !== null && data.first_token !== undefined) this.#firsts.push(data.first_token);
    if (!["done", "client_gone", "answer_ended"].includes(data.outcome)) {
      this.#fail({ at: data.at, id: data.model, reason: `An answer on ${data.path} failed: ${data.outcome.replaceAll("_", " ")}.` });
    }
  }

  #noteFailure(failure) {
    if (failure) this.#fail({ at: failure.at, id: failure.id, reason: failure.reason, log: failure.log });
  }

  #fail(failure) {
    if (this.failures.some((each) => each.at === failure.at && each.reason === failure.reason)) return;
    this.failures = [failure, ...this.failures].sort((a, b) => b.at - a.at).slice(0, KEPT);
    if (this.time - failure.at < 30) {
      this.dispatchEvent(new CustomEvent("failure", { detail: failure }));
    }
  }

  #sample() {
    if (!this.isLive) return;
    const isFresh = performance.now() - this.#figuresAt < 2500; // no figures: nothing is under way
    const firsts = this.#firsts.splice(0);
    this.samples.push({
      speed: isFresh ? this.state.tokens_per_second?.now ?? 0 : 0,
      first: firsts.length ? firsts.reduce((a, b) => a + b) / firsts.length : null,
    });
    if (this.samples.length > SAMPLES) this.samples.shift();
    if (!isFresh && this.answers.length) this.state = { ...this.state, answers: [] };
    this.dispatchEvent(new Event("second"));
  }

  #changed() {
    this.dispatchEvent(new Event("change"));
  }
}

export const store = new Store();
