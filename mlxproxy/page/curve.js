// A curve of the last minutes as SVG.

import { h, svg } from "./dom.js";

const WIDTH = 300;
const HEIGHT = 72;

const figure = (value) => value.toFixed(value < 10 ? 2 : value < 100 ? 1 : 0);

/**
 * Return a figure with a curve.
 *
 * values: one for each second, the newest last; null where there is none. `dots` draws each value
 * by itself, for figures that come now and then.
 */
export function curve({ title, unit, values, now, dots = false }) {
  const most = Math.max(...values.filter((value) => value !== null), 0);
  const top = most > 0 ? most * 1.15 : 1;
  const x = (at) => (WIDTH - values.length + at).toFixed(1);
  const y = (value) => (HEIGHT - 1 - (value / top) * (HEIGHT - 6)).toFixed(1);
  const points = values.map((value, at) => (value === null ? null : [x(at), y(value)])).filter(Boolean);
  const shape = dots
    ? svg("path", { class: "dots", d: points.map(([px, py]) => `M${px} ${py}h0`).join("") })
    : points.length > 1 && [
      svg("path", { class: "area", d: `M${points[0][0]} ${HEIGHT}L${points.map((p) => p.join(" ")).join("L")}L${points.at(-1)[0]} ${HEIGHT}Z` }),
      svg("path", { class: "line", d: `M${points.map((p) => p.join(" ")).join("L")}` }),
    ];
  return h("figure", { class: "curve" },
    h("figcaption", {}, h("span", {}, title), h("strong", {}, now, h("small", {}, ` ${unit}`))),
    svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `${title}, last ${Math.round(WIDTH / 60)} minutes: ${most > 0 ? `at most ${figure(most)} ${unit}` : "nothing yet"}` },
    shape),
    h("div", { class: "axis", "aria-hidden": "true" }, h("span", {}, "5 min ago"),
      h("span", {}, most > 0 ? `max ${figure(most)}` : ""), h("span", {}, "now")));
}
