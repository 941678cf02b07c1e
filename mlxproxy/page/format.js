// Figures as people read them.

const UNITS = ["B", "kB", "MB", "GB", "TB"];

export function bytes(value) {
  if (value === null || value === undefined) return "–";
  let unit = 0;
  while (value >= 999.5 && unit < UNITS.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value >= 100 || unit === 0 ? Math.round(value) : value.toFixed(1)} ${UNITS[unit]}`;
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value > 0 && value < 0.995) return `${Math.round(value * 1000)} ms`;
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 59.5) return `${Math.round(value)} s`;
  const whole = Math.round(value);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${whole % 60} s`;
  return `${Math.floor(whole / 3600)} h ${Math.floor((whole % 3600) / 60)} min`;
}

export const count = (value) => value.toLocaleString("en");
export const many = (value, word) => `${count(value)} ${word}${value === 1 ? "" : "s"}`;

export const rate = (value) =>
  value === null || value === undefined ? "–" : `${value >= 100 ? Math.round(value) : value.toFixed(1)}`;

export const context = (tokens) =>
  !tokens ? "–" : tokens < 1000 ? String(tokens) : `${Math.round(tokens / 1024)}k`;

export const clock = (unix) =>
  new Date(unix * 1000).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });

export const shortName = (id) => (id ?? "").slice((id ?? "").lastIndexOf("/") + 1);
export const publisher = (id) => (id.includes("/") ? id.slice(0, id.lastIndexOf("/")) : "");
