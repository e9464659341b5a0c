// What the pages for Go and the studio share: language, theme, key, the words of a refusal, small drawings.
import { ApiError } from "./api.js";
import { h } from "./dom.js";
import { language, setLanguage, t, translate } from "./i18n.js";
import { recall, remember } from "./storage.js";

const THEMES = ["auto", "light", "dark"];
const $ = (id) => document.getElementById(id);

/** Wires the header's buttons; `draw` is called whenever the words or the key have changed. */
export function startPage(draw) {
  $("language").addEventListener("click", () => {
    setLanguage(language() === "en" ? "zh" : "en");
    words(draw);
  });
  $("theme").addEventListener("click", () => {
    const theme = THEMES[(THEMES.indexOf(recall("theme", "auto")) + 1) % THEMES.length];
    remember("theme", theme);
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    words(draw);
  });
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    remember("key", $("key").value.trim());
    $("key-form").hidden = true;
    draw();
  });
  words(draw);
}

function words(draw) {
  translate();
  const theme = t("theme." + recall("theme", "auto"));
  $("theme").textContent = theme;
  draw();
}

/** Says what went wrong in the page's one place for it; a server that wants a key gets a field for one. */
export function refused(error) {
  if (error.name === "AbortError") return;
  if (!(error instanceof ApiError)) throw error;
  if (error.status === 401 || error.status === 403) {
    $("key-form").hidden = false;
    $("key").value = recall("key", "") ?? "";
  }
  say(error.status === 0 ? t("server.away") : error.message);
}

/** A sentence that stays until the next one; empty takes it away. */
export function say(text) {
  $("said").textContent = text;
  $("said").hidden = !text;
}

/** As `h`, for drawings. */
export function svg(tag, properties = {}, ...children) {
  const element = document.createElementNS(document.querySelector("svg").namespaceURI, tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}%`;

/** A table of cells that are texts or elements. */
export function table(heads, rows) {
  return h("table", { class: "figures" },
    h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))),
    h("tbody", {}, rows.map((cells) => h("tr", {}, cells.map((cell) => h("td", {}, cell))))));
}

/** Elo over CPU-minutes: a line, a dot for each turn, filled where it was promoted. */
export function curve(turns) {
  const [wide, high, left, low] = [360, 190, 44, 28];
  const most = Math.max(...turns.map((turn) => turn.cpu_minutes), 0.001);
  const top = Math.max(...turns.map((turn) => turn.elo), 1);
  const x = (minutes) => left + ((wide - left - 12) * minutes) / most;
  const y = (elo) => high - low - ((high - low - 14) * elo) / top;
  const points = [{ cpu_minutes: 0, elo: 0 }, ...turns];
  const marks = [0, top / 2, top];
  return svg("svg", { viewBox: `0 0 ${wide} ${high}`, class: "plot", role: "img", "aria-label": t("go.curve") },
    marks.map((elo) => [
      svg("line", { x1: left, x2: wide - 8, y1: y(elo), y2: y(elo), class: "grid" }),
      svg("text", { x: left - 6, y: y(elo) + 4, "text-anchor": "end" }, String(Math.round(elo))),
    ]),
    svg("text", { x: wide - 8, y: high - 6, "text-anchor": "end" }, t("go.minutes", { n: most.toFixed(1) })),
    svg("polyline", { points: points.map((point) => `${x(point.cpu_minutes)},${y(point.elo)}`).join(" "), class: "rise" }),
    turns.map((turn) =>
      svg("circle", { cx: x(turn.cpu_minutes), cy: y(turn.elo), r: 4, class: turn.promoted ? "promoted" : "kept" },
        svg("title", {}, `${turn.turn}: ${Math.round(turn.elo)}`))));
}
