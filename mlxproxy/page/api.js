// Requests to the proxy, with the key if there is one. The key stays in this browser.

import { events } from "./sse.js";

const KEY = "mlxproxy.key";

/** The proxy's own error, with its sentence. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null } = {}) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

class Api extends EventTarget {
  get key() {
    try {
      return localStorage.getItem(KEY) ?? "";
    } catch {
      return this.unsaved ?? ""; // this browser keeps nothing
    }
  }

  set key(value) {
    this.unsaved = value;
    try {
      if (value) localStorage.setItem(KEY, value);
      else localStorage.removeItem(KEY);
    } catch { /* then it holds until the page is closed */ }
    this.dispatchEvent(new Event("key"));
  }

  /** Return the response, or throw an ApiError. A missing or wrong key raises the event `keyless`. */
  async fetch(path, { method = "GET", body, signal } = {}) {
    const headers = {};
    if (this.key) headers.Authorization = `Bearer ${this.key}`;
    if (body !== undefined) headers["Content-Type"] = "application/json";
    let response;
    try {
      response = await fetch(path, {
        method, headers, signal, cache: "no-store", credentials: "same-origin",
        body: body === undefined ? undefined : JSON.stringify(body),
      });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("mlxproxy does not answer. Is it running?");
    }
    if (response.ok) return response;
    let message = `mlxproxy answered with status ${response.status}.`;
    let code = null;
    try {
      ({ message, code } = (await response.json()).error);
    } catch { /* something in between has answered */ }
    if (response.status === 401) this.dispatchEvent(new Event("keyless"));
    throw new ApiError(message, { status: response.status, code });
  }

  async json(path, options) {
    return (await this.fetch(path, options)).json();
  }

  /** Yield the events and comments of a stream. */
  async* stream(path, options) {
    const response = await this.fetch(path, options);
    options?.onResponse?.(response);
    yield* events(response.body);
  }
}

export const api = new Api();
