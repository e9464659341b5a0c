// A small markdown for answers: paragraphs, headings, lists, quotes, tables, rules, fenced code; bold, italic, strike,
// code, links. It builds elements and sets textContent, never markup, so an answer cannot run anything. Images are shown
// as links: loading one would tell another server what was said. Not here: HTML, footnotes, formulas.
import { copyButton, h } from "./dom.js";

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^\s`]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)、])\s+(.*)$/;
const QUOTE = /^ {0,3}>\s?(.*)$/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const DEEPEST = 12;

/**
 * Shows `source` in `target`. Blocks whose text did not change are left alone, so that a growing answer costs its last
 * block only and a selection in the finished part survives.
 */
export function renderMarkdown(target, source, depth = 0) {
  const blocks = split(source);
  const kept = target.blocks ?? [];
  let same = 0;
  while (same < kept.length && same < blocks.length && kept[same] === blocks[same].key) same++;
  while (target.children.length > same) target.lastElementChild.remove();
  for (const block of blocks.slice(same)) target.append(element(block, depth));
  target.blocks = blocks.map((block) => block.key);
}

/** Cuts text into blocks {kind, lines, key}; an unclosed fence (still streaming) runs to the end. */
export function split(source) {
  const lines = source.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  const take = (kind, more, extra = {}) => {
    const from = at++;
    while (at < lines.length && more(lines[at])) at++;
    const own = lines.slice(from, at);
    blocks.push({ kind, lines: own, key: kind + "\n" + own.join("\n"), ...extra });
  };
  const interrupts = (line) => FENCE.test(line) || HEADING.test(line) || RULE.test(line) || ITEM.test(line) || QUOTE.test(line);
  while (at < lines.length) {
    const line = lines[at];
    const fence = FENCE.exec(line);
    if (line.trim() === "") at++;
    else if (fence) takeFence(fence);
    else if (HEADING.test(line)) take("heading", () => false);
    else if (RULE.test(line)) take("rule", () => false);
    else if (QUOTE.test(line)) take("quote", (next) => QUOTE.test(next));
    else if (line.includes("|") && TABLE_RULE.test(lines[at + 1] ?? "") && lines[at + 1].includes("-")) take("table", (next) => next.includes("|"));
    else if (ITEM.test(line)) takeList();
    else take("paragraph", (next) => next.trim() !== "" && !interrupts(next));
  }
  return blocks;

  function takeFence([, mark, language]) {
    const from = at++;
    const close = new RegExp(`^ {0,3}${mark[0]}{${mark.length},}\\s*$`);
    while (at < lines.length && !close.test(lines[at])) at++;
    const code = lines.slice(from + 1, at).join("\n");
    if (at < lines.length) at++;
    blocks.push({ kind: "code", language, code, key: `code ${language}\n${code}` });
  }

  function takeList() {
    take("list", (next) => {
      if (ITEM.test(next)) return !RULE.test(next);
      if (next.trim() === "") return /^\s+\S/.test(lines[at + 1] ?? "") || ITEM.test(lines[at + 1] ?? "");
      return /^\s{2,}\S/.test(next) || !(FENCE.test(next) || HEADING.test(next) || QUOTE.test(next) || lines[at - 1].trim() === "");
    });
  }
}

/** Deeper than people nest, a block is plain words: rubbish such as "> > > >" must not exhaust the stack. */
function element(block, depth) {
  const kind = depth < DEEPEST || block.kind === "code" ? block.kind : "paragraph";
  switch (kind) {
    case "code":
      return codeBlock(block);
    case "heading": {
      const [, marks, text] = HEADING.exec(block.lines[0]);
      return h(`h${Math.min(6, marks.length + 2)}`, {}, inline(text));
    }
    case "rule":
      return h("hr");
    case "quote": {
      const quote = h("blockquote");
      renderMarkdown(quote, block.lines.map((line) => QUOTE.exec(line)[1]).join("\n"), depth + 1);
      return quote;
    }
    case "table":
      return table(block.lines);
    case "list":
      return list(block.lines, depth);
    default:
      return h("p", {}, withBreaks(block.lines));
  }
}

function codeBlock({ language, code }) {
  const head = h("div", { class: "code-head" }, h("span", {}, language), copyButton("code.copy", () => code));
  return h("div", { class: "code" }, head, h("pre", { tabindex: "0" }, h("code", {}, code)));
}

function withBreaks(lines) {
  return lines.flatMap((line, i) => (i ? [h("br"), ...inline(line)] : inline(line)));
}

function table(lines) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const sides = cells(lines[1]).map((rule) => (rule.endsWith(":") ? (rule.startsWith(":") ? "center" : "right") : null));
  const row = (line, tag) => h("tr", {}, cells(line).map((cell, i) => h(tag, { class: sides[i] }, inline(cell))));
  return h("div", { class: "table" }, h("table", {}, h("thead", {}, row(lines[0], "th")), h("tbody", {}, lines.slice(2).map((line) => row(line, "td")))));
}

/** Items by indentation; deeper lines belong to the item above them and are blocks of their own. */
function list(lines, depth) {
  const [, base, mark] = ITEM.exec(lines[0]);
  const ordered = /\d/.test(mark);
  const items = [];
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= base.length + 1) items.push([item[3]]);
    else items.at(-1).push(line);
  }
  const start = ordered ? parseInt(mark, 10) : 1;
  return h(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null }, items.map((item) => listItem(item, depth)));
}

function listItem(lines, depth) {
  const entry = h("li");
  const indent = Math.min(...lines.slice(1).filter((line) => line.trim()).map((line) => line.search(/\S/)), 99);
  const first = lines.slice(1).findIndex((line) => line.trim() === "" || ITEM.test(line) || FENCE.test(line));
  const head = first < 0 ? lines : lines.slice(0, first + 1);
  entry.append(...withBreaks(head.map((line) => line.trim())));
  if (first >= 0) {
    const rest = h("div");
    renderMarkdown(rest, lines.slice(first + 1).map((line) => line.slice(indent)).join("\n"), depth + 1);
    entry.append(...rest.childNodes);
  }
  return entry;
}

const INLINE = [
  [/^(`+)([\s\S]*?[^`])\1(?!`)/, (m) => h("code", {}, m[2].replace(/^ (.*) $/, "$1"))],
  [/^\*\*(?=\S)([\s\S]*?\S)\*\*/, (m, depth) => h("strong", {}, inline(m[1], depth + 1))],
  [/^__(?=\S)([\s\S]*?\S)__(?!\w)/, (m, depth) => h("strong", {}, inline(m[1], depth + 1))],
  [/^~~(?=\S)([\s\S]*?\S)~~/, (m, depth) => h("s", {}, inline(m[1], depth + 1))],
  [/^\*(?=[^\s*])([\s\S]*?[^\s*])\*(?!\*)/, (m, depth) => h("em", {}, inline(m[1], depth + 1))],
  [/^_(?=[^\s_])([\s\S]*?[^\s_])_(?!\w)/, (m, depth) => h("em", {}, inline(m[1], depth + 1))],
  [/^!?\[([^\]\n]*)\]\(\s*<?([^\s<>()]*(?:\([^\s()]*\)[^\s<>()]*)*)>?(?:\s+"[^"]*")?\s*\)/, (m) => link(m[2], m[1] || m[2])],
  [/^https?:\/\/[^\s<>"'`（）。，、；：！？【】《》]+[^\s<>"'`（）。，、；：！？【】《》.,;:!?)\]]/, (m) => link(m[0], m[0])],
];
const SPECIAL = /[`*_~!\[\\h]/;

/** Only web and mail addresses become links; `javascript:` and all others stay words. */
function link(address, text) {
  let url = null;
  try {
    url = new URL(address);
  } catch {
    /* relative addresses mean nothing in an answer */
  }
  if (!url || !["http:", "https:", "mailto:"].includes(url.protocol)) return h("span", {}, text);
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer nofollow" }, text);
}

/** A list of text and elements for one line of markdown. */
export function inline(text, depth = 0) {
  const out = [];
  let plain = "";
  let before = "";
  while (text) {
    const next = text.slice(1).search(SPECIAL) + 1;
    const escaped = /^\\([!-/:-@[-`{-~])/.exec(text);
    const found = escaped ? null : match(text, before, depth);
    if (found) {
      if (plain) out.push(plain);
      plain = "";
      out.push(found.element);
    } else if (escaped) plain += escaped[1];
    const used = found ? found.length : escaped ? 2 : next || text.length;
    if (!found && !escaped) plain += text.slice(0, used);
    before = text[used - 1];
    text = text.slice(used);
  }
  if (plain) out.push(plain);
  return out;
}

function match(text, before, depth) {
  if (depth > DEEPEST || !SPECIAL.test(text[0])) return null;
  if ((text[0] === "_" || text[0] === "h") && /\w/.test(before)) return null; // snake_case and `xhttp` are words
  for (const [pattern, build] of INLINE) {
    const m = pattern.exec(text);
    if (m) return { element: build(m, depth), length: m[0].length };
  }
  return null;
}
