// Building the page out of elements. Text only ever enters through textContent, so nothing a model or a user writes can
// become markup.
import { t } from "./i18n.js";

/** `h("button", {class: "x", onclick: f, "aria-label": "y"}, "text", child, ...)`; null and false children are left out. */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "hidden" || name === "disabled") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** A drawing of index.html's sprite. */
export function icon(name) {
  const drawing = document.getElementById("icon").content.firstElementChild.cloneNode(true);
  drawing.firstElementChild.setAttribute("href", "#i-" + name);
  return drawing;
}

/** A button that is only a drawing; its name is read aloud and shown on hover. */
export function iconButton(name, key, onclick, properties = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": t(key), title: t(key), onclick, ...properties }, icon(name));
}

/** Enter that only accepts a word of an input method must never send (UI Events, composition; 229 is what Safari says). */
export function isSendKey(event) {
  if (event.isComposing || event.keyCode === 229) return false;
  return event.key === "Enter" && !event.shiftKey && !event.ctrlKey && !event.altKey && !event.metaKey;
}

export const isComposing = (event) => event.isComposing || event.keyCode === 229;

/** Copies, also where the clipboard API is missing (a page that is not on https or localhost). */
export async function copyText(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = h("textarea", { class: "hidden-copy", value: text, readonly: true });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

/** A copy button that says so for a moment. */
export function copyButton(key, text) {
  const button = iconButton("copy", key, async () => {
    await copyText(text());
    button.replaceChildren(icon("check"));
    button.setAttribute("aria-label", t("action.copied"));
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.setAttribute("aria-label", t(key));
    }, 1500);
  });
  return button;
}

/** Grows a text area with its text where the browser cannot do it by itself. */
export function fit(area) {
  if (CSS.supports("field-sizing", "content")) return;
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight}px`;
}

/** The language of a text, for the right glyphs and voice: one code point of Chinese, Japanese and Korean looks different in each. */
export function languageOf(text) {
  if (/[\u3040-\u30ff]/.test(text)) return "ja";
  if (/[\uac00-\ud7af]/.test(text)) return "ko";
  return /\p{Script=Han}/u.test(text) ? "zh-CN" : "";
}
