// Each model's speed and time to first token over the last minutes. The proxy has them for the answers
// that have ended; those under way are added here, in the same way.

export const SECONDS = 300; // that the curves show
const SHORTEST = 0.05; // seconds from the first token to the last; else they came all together

export class Curves {
  #models = new Map(); // by id: a map from Unix seconds to {tokens, waits, firsts}

  /** Begin with what the proxy has told at that time. */
  restore(told, at) {
    this.#models = new Map(Object.entries(told).map(([id, { tokens_per_second, first_token }]) => {
      const begin = Math.floor(at) - tokens_per_second.length;
      return [id, new Map(tokens_per_second.map((tokens, index) => {
        const wait = first_token[index];
        return [begin + index, { tokens, waits: wait ?? 0, firsts: wait === null ? 0 : 1 }];
      }))];
    }));
  }

  /** Add an answer that ended at that time. */
  add(answer, at) {
    if (!this.#models.has(answer.model)) this.#models.set(answer.model, new Map());
    const seconds = this.#models.get(answer.model);
    spread(seconds, answer, at);
    for (const second of seconds.keys()) if (second < at - 2 * SECONDS) seconds.delete(second);
  }

  /** Return the values of the whole seconds before `now`; `underWay` are a model's answers, as they were at `at`. */
  values(id, underWay, at, now) {
    const live = new Map();
    for (const answer of underWay) spread(live, answer, at);
    const ended = this.#models.get(id) ?? new Map();
    const speed = [];
    const first = [];
    const until = Math.floor(now);
    for (let second = until - SECONDS; second < until; second += 1) {
      const both = [ended.get(second), live.get(second)].filter(Boolean);
      const sum = (name) => both.reduce((total, each) => total + each[name], 0);
      speed.push(sum("tokens"));
      first.push(sum("firsts") ? sum("waits") / sum("firsts") : null);
    }
    return { speed, first };
  }
}

/** Add an answer's tokens, evenly over its time, and its time to first token, as of that time. */
function spread(seconds, { first_token, tokens_out, waited, seconds: took }, at) {
  if (first_token === null || first_token === undefined) return;
  const started = at - took;
  const place = (second) => {
    if (!seconds.has(second)) seconds.set(second, { tokens: 0, waits: 0, firsts: 0 });
    return seconds.get(second);
  };
  const first = place(Math.floor(started + first_token));
  first.waits += first_token;
  first.firsts += 1;
  let begin = started + first_token;
  if (at - begin < SHORTEST) begin = started + (waited ?? 0);
  const rate = tokens_out / Math.max(at - begin, SHORTEST);
  for (let second = Math.max(Math.floor(begin), Math.floor(at) - SECONDS); second < at; second += 1) {
    place(second).tokens += rate * (Math.min(at, second + 1) - Math.max(begin, second));
  }
}
