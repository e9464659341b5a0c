// Language of the page: follows navigator.languages until the visible switch is used.
import { STRINGS } from "./strings.js";
import { recall, remember } from "./storage.js";

let current = choose();

function choose() {
  const kept = recall("language");
  if (STRINGS[kept]) return kept;
  for (const tag of navigator.languages ?? [navigator.language ?? "en"]) {
    const language = tag.toLowerCase().split("-")[0];
    if (STRINGS[language]) return language;
  }
  return "en";
}

export const language = () => current;

export function setLanguage(name) {
  current = STRINGS[name] ? name : "en";
  remember("language", current);
}

/** The text of `key` with `{name}` filled in; an unknown key shows itself, so that a test can see it. */
export function t(key, values = {}) {
  const text = STRINGS[current][key] ?? STRINGS.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => String(values[name] ?? ""));
}

/** Fills `data-t` (text), `data-t-label` (name and tooltip), `data-t-title` (tooltip) and `data-t-placeholder` below `root`. */
export function translate(root = document) {
  document.documentElement.lang = current === "zh" ? "zh-CN" : "en";
  for (const element of root.querySelectorAll("[data-t]")) element.textContent = t(element.dataset.t);
  for (const element of root.querySelectorAll("[data-t-label]")) {
    element.setAttribute("aria-label", t(element.dataset.tLabel));
    element.title = t(element.dataset.tLabel);
  }
  for (const element of root.querySelectorAll("[data-t-title]")) element.title = t(element.dataset.tTitle);
  for (const element of root.querySelectorAll("[data-t-placeholder]")) element.placeholder = t(element.dataset.tPlaceholder);
}

export const time = (ms) =>
  new Intl.DateTimeFormat(current === "zh" ? "zh-CN" : "en", { dateStyle: "medium", timeStyle: "medium" }).format(ms);
