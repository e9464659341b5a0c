// A conversation as a tree of messages: editing or regenerating adds a sibling, nothing is ever overwritten.
// Pure functions over plain JSON; no page, no network.
import { uuid } from "./storage.js";

export const ROOT = "root";

export function newChat() {
  const now = Date.now();
  return { id: uuid(), title: "", created: now, updated: now, system: "", nodes: {}, children: {}, active: {} };
}

function add(chat, node) {
  chat.nodes[node.id] = node;
  (chat.children[node.parent] ??= []).push(node.id);
  chat.active[node.parent] = node.id;
  chat.updated = Date.now();
  return node;
}

export function addUser(chat, parent, text) {
  if (!chat.title) chat.title = text.trim().replace(/\s+/g, " ").slice(0, 80);
  return add(chat, { id: uuid(), parent, role: "user", text, created: Date.now() });
}

/** An answer that is about to be streamed; `feedback` maps a slot (thumb, comment, edit, choice) to what was sent. */
export function addAnswer(chat, parent, model, sampling) {
  return add(chat, {
    id: uuid(), parent, role: "assistant", text: "", created: Date.now(), model, sampling, status: "streaming", feedback: {},
  });
}

/** The visible line of messages, root first. */
export function path(chat) {
  const nodes = [];
  for (let id = chat.active[ROOT]; id && chat.nodes[id]; id = chat.active[id]) nodes.push(chat.nodes[id]);
  return nodes;
}

export const last = (chat) => path(chat).at(-1) ?? null;
export const siblings = (chat, node) => chat.children[node.parent] ?? [node.id];

export function step(chat, node, by) {
  const ids = siblings(chat, node);
  const to = ids[ids.indexOf(node.id) + by];
  if (to) chat.active[node.parent] = to;
}

/** What the model is shown of an answer: the user's correction where there is one. */
export const shown = (node) => node.edited ?? node.text;

/** OpenAI messages from the system prompt down to `node` (itself included). */
export function messagesTo(chat, node) {
  const messages = [];
  for (let at = node; at; at = chat.nodes[at.parent]) {
    if (at.role === "user" || shown(at)) messages.unshift({ role: at.role, content: shown(at) });
  }
  if (chat.system?.trim()) messages.unshift({ role: "system", content: chat.system });
  return messages;
}

/** `spark@3`, else what the server said of itself, else the name that was asked for. */
export function versionName(node) {
  const from = node.prairie ?? {};
  if (from.line && from.version != null) return `${from.line}@${from.version}`;
  return from.line ?? node.answered ?? node.model ?? "";
}

/** A page closed in the middle of an answer: the part that came is kept and called stopped. */
export function settle(chat) {
  for (const node of Object.values(chat.nodes)) if (node.status === "streaming") node.status = "stopped";
  return chat;
}
