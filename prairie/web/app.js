// Prairie's chat page: wires the conversation tree (chat.js), its drawing (transcript.js), the API (api.js) and the
// votes on their way (outbox.js). A plain client of the public HTTP API.
import { ApiError, getFeedback, listModels, streamChat } from "./api.js";
import { ROOT, addAnswer, addUser, last, messagesTo, newChat, path, settle, step, versionName } from "./chat.js";
import { fit, h, icon, iconButton, isComposing, isSendKey } from "./dom.js";
import { language, setLanguage, t, time, translate } from "./i18n.js";
import { Outbox } from "./outbox.js";
import { chatIndex, deleteChat, forget, loadChat, onStorageFull, pseudonym, recall, remember, saveChat, uuid } from "./storage.js";
import { Transcript } from "./transcript.js";

const $ = (id) => document.getElementById(id);
const DEFAULTS = { temperature: 0.8, top_p: 0.95, max_tokens: 512 };
const SAME_MODEL = "";
const SAVE_EVERY_MS = 1000;
const NEAR_THE_END_PX = 80;
const LOADING_MS = 1500;

const state = {
  chat: newChat(),
  models: [],
  model: recall("model", ""),
  rival: recall("rival", SAME_MODEL),
  comparing: recall("comparing", false),
  sampling: { ...DEFAULTS, ...recall("sampling", {}) },
  streams: new Map(), // chat id -> {chat, controller, nodes}
  follow: true, // the page scrolls along with the answer
};
const outbox = new Outbox();
const transcript = new Transcript($("transcript"), {
  step: moveBetweenVersions,
  branch: (node, text) => ask(state.chat, addUser(state.chat, node.parent, text)),
  regenerate: (node) => answer(state.chat, state.chat.nodes[node.parent]),
  retry,
  thumb,
  comment: (node, text) => give(node, "comment", { value: text }, { kind: "comment", value: { text } }),
  edit: correct,
  undo,
  source: showSource,
  verdict,
  proceed,
});
transcript.onDrawn = scrollAlong;

// --- conversation -----------------------------------------------------------------------------------------------------

function openChat(chat) {
  state.chat = chat;
  heal(chat);
  remember("open", chat.id);
  $("system").value = chat.system ?? "";
  state.follow = true;
  draw();
  scrollAlong();
  closeSidebarOnNarrow();
}

/** The one object of a conversation: the open one or the one being streamed into, else the stored one. */
function chatOf(id) {
  if (state.chat.id === id) return state.chat;
  const stored = state.streams.get(id)?.chat ?? loadChat(id);
  return stored && !state.streams.has(id) ? settle(stored) : stored;
}

function startChat() {
  openChat(newChat());
  $("input").focus();
}

function draw() {
  const empty = path(state.chat).length === 0;
  $("empty").hidden = !empty;
  transcript.show(state.chat);
  drawComposer();
  drawChats();
  $("export").hidden = empty;
  document.title = state.chat.title ? `${state.chat.title} · Prairie` : "Prairie";
}

function moveBetweenVersions(node, by) {
  step(state.chat, node, by);
  save(state.chat);
  draw();
}

const saves = new Map();
const deleted = new Set(); // an answer that is still being cut off must not bring its conversation back
/** Stored at once, or at most once a second while an answer is streaming. */
function save(chat, { soon = false } = {}) {
  if (deleted.has(chat.id)) return;
  if (soon) {
    if (!saves.has(chat.id)) saves.set(chat.id, setTimeout(() => save(chat), SAVE_EVERY_MS));
    return;
  }
  clearTimeout(saves.get(chat.id));
  saves.delete(chat.id);
  saveChat(chat);
}

async function submit() {
  const text = $("input").value;
  if (!text.trim() || state.streams.has(state.chat.id)) return;
  if (!state.model) return toast(t("composer.no_model"));
  if (pendingPair()) return toast(t("composer.vote_first"));
  const end = last(state.chat);
  const asked = end?.role === "assistant" ? state.chat.nodes[end.parent] : null;
  if (asked?.compare) asked.compare.closed = true;
  $("input").value = "";
  forget("draft");
  fit($("input"));
  await ask(state.chat, addUser(state.chat, end?.id ?? ROOT, text));
}

function ask(chat, user) {
  return state.comparing ? answerTwice(chat, user) : answer(chat, user);
}

function pendingPair() {
  const end = last(state.chat);
  const user = end?.role === "assistant" ? state.chat.nodes[end.parent] : null;
  return user?.compare && !user.compare.verdict && !user.compare.closed ? user : null;
}

// --- answers ----------------------------------------------------------------------------------------------------------

const request = (chat, user, model) => ({ model, messages: messagesTo(chat, user), user: pseudonym(), ...sampling() });

function sampling() {
  const { temperature, top_p, max_tokens } = state.sampling;
  return { temperature, top_p, max_tokens };
}

async function answer(chat, user, model = state.model) {
  if (state.streams.has(chat.id)) return;
  if (user.compare) user.compare.closed = true;
  const node = addAnswer(chat, user.id, model, sampling());
  await run(chat, [node], (signal) => stream(chat, [node], request(chat, user, model), signal));
}

/** Two blind answers. Which of them stands left is drawn by lot, so that neither name nor order says who is who. */
async function answerTwice(chat, user) {
  if (state.streams.has(chat.id)) return;
  const same = state.rival === SAME_MODEL || state.rival === state.model;
  const names = [state.model, same ? state.model : state.rival];
  const nodes = names.map((name) => addAnswer(chat, user.id, name, sampling()));
  const swap = crypto.getRandomValues(new Uint8Array(1))[0] & 1;
  user.compare = { left: nodes[swap].id, right: nodes[1 - swap].id, verdict: null, closed: false };
  chat.active[user.id] = user.compare.left;
  await run(chat, nodes, (signal) =>
    same
      ? stream(chat, nodes, { ...request(chat, user, names[0]), n: 2 }, signal)
      : Promise.all(nodes.map((node, i) => stream(chat, [node], request(chat, user, names[i]), signal))));
}

async function run(chat, nodes, work) {
  const controller = new AbortController();
  state.streams.set(chat.id, { chat, controller, nodes });
  save(chat);
  if (chat === state.chat) {
    remember("open", chat.id);
    state.follow = true;
    draw();
    scrollAlong();
  }
  say(t("answer.writing"));
  try {
    await work(controller.signal);
  } finally {
    state.streams.delete(chat.id);
    save(chat);
    if (chat === state.chat) draw();
    say(t("answer.finished"));
    if (nodes.some(isNews)) refreshModels();
  }
}

/** The answer came from another version than the picker shows: the line has been promoted or rolled back. */
function isNews(node) {
  const known = state.models.find((model) => model.id === node.model)?.prairie;
  return known?.version != null && node.prairie?.version != null && known.version !== node.prairie.version;
}

/** Streams one request into `nodes` (one per choice); never throws: what went wrong is written on the nodes. */
async function stream(chat, nodes, body, signal) {
  const clock = { start: performance.now(), first: [], last: [], pieces: nodes.map(() => 0) };
  let usage = null;
  try {
    await streamChat(body, {
      signal,
      onChunk(chunk) {
        usage = chunk.usage ?? usage;
        for (const choice of chunk.choices ?? []) {
          const node = nodes[choice.index];
          if (node) take(node, choice, chunk, clock);
          if (node && chat === state.chat) transcript.touch(node);
        }
        save(chat, { soon: true });
      },
    });
    for (const node of nodes) node.status = "done";
  } catch (error) {
    for (const node of nodes) fail(node, error, signal);
    if (error.status === 401) askForKey({ wrong: Boolean(recall("key")) });
    else if (!(error instanceof ApiError) && !signal.aborted) console.error(error);
    else if (isUnreached(error) && !away) refreshModels();
  }
  nodes.forEach((node, i) => measure(node, i, nodes.length, clock, usage));
  for (const node of nodes) if (chat === state.chat) transcript.touch(node);
}

function take(node, choice, chunk, clock) {
  node.response_id ??= choice.response_id ?? (choice.index ? `${chunk.id}:${choice.index}` : chunk.id);
  node.answered ??= chunk.model;
  node.fingerprint ??= chunk.system_fingerprint;
  node.prairie ??= chunk.prairie;
  const delta = choice.delta?.content ?? "";
  if (delta) {
    node.text += delta;
    clock.first[choice.index] ??= performance.now();
    clock.last[choice.index] = performance.now();
    clock.pieces[choice.index] += 1;
  }
  if (choice.finish_reason) {
    node.finish_reason = choice.finish_reason;
    node.status = "done";
  }
}

function fail(node, error, signal) {
  if (node.finish_reason) return; // this choice had already ended well
  node.status = signal.aborted ? "stopped" : "error";
  node.error = error.message ?? "";
  node.unreached = isUnreached(error); // then the words are the browser's, and not in the reader's language
}

const isUnreached = (error) => error instanceof ApiError && error.status === 0 && error.code === null;

/** Tokens per second after the first one. The server counts tokens of the whole request; pieces share them out. */
function measure(node, i, count, clock, usage) {
  const seconds = ((clock.last[i] ?? 0) - (clock.first[i] ?? 0)) / 1000;
  const all = clock.pieces.reduce((sum, n) => sum + n, 0);
  const tokens = usage ? (count === 1 ? usage.completion_tokens : Math.round((usage.completion_tokens * clock.pieces[i]) / (all || 1))) : clock.pieces[i];
  node.tokens = { prompt: usage?.prompt_tokens ?? null, completion: tokens };
  node.first_ms = clock.first[i] ? Math.round(clock.first[i] - clock.start) : null;
  node.speed = tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null;
}

/** An answer that failed is asked for again; one without a word leaves no trace. A failed pair is asked for as a pair. */
function retry(node) {
  const chat = state.chat;
  if (state.streams.has(chat.id)) return;
  const user = chat.nodes[node.parent];
  const again = user.compare && !user.compare.closed ? [user.compare.left, user.compare.right] : [node.id];
  for (const id of again) {
    if (chat.nodes[id].text && again.length === 1) continue;
    delete chat.nodes[id];
    chat.children[user.id] = chat.children[user.id].filter((child) => child !== id);
  }
  transcript.show(chat, { fresh: true });
  if (again.length === 2) answerTwice(chat, user);
  else answer(chat, user);
}

function stop() {
  state.streams.get(state.chat.id)?.controller.abort();
}

// --- votes ------------------------------------------------------------------------------------------------------------

/** Sends one piece of feedback on an answer; `shown` is what the page remembers of it. */
function give(node, slot, shown, body) {
  const given = (node.feedback[slot] ??= { votes: [] });
  Object.assign(given, shown, { state: "saving", message: "" });
  node.feedback.latest = slot;
  node.feedback.undone = false;
  const item = outbox.add({ response_id: node.response_id, ...body }, { chat: state.chat.id, node: node.id, slot });
  given.votes = [...given.votes.filter((vote) => vote.key !== item.key), { key: item.key, body: item.body, event: null }];
  save(state.chat);
  transcript.touch(node);
}

/** The same thumb again takes it back. */
function thumb(node, value, reasons, { reasonsChanged = false } = {}) {
  if (!reasonsChanged && node.feedback.thumb?.value === value) return undo(node, "thumb");
  give(node, "thumb", { value, reasons }, { kind: "thumb", value: reasons.length ? { thumb: value, reasons } : value });
}

function correct(node, text) {
  node.edited = text;
  give(node, "edit", { value: text }, { kind: "edit", value: { text } });
  draw();
}

/** Takes back all that was given in one slot: newest first, so that no earlier vote comes back to life. */
function undo(node, slot) {
  const given = node.feedback[slot];
  if (!given) return;
  for (const vote of given.votes.toReversed()) outbox.retract(vote);
  delete node.feedback[slot];
  if (slot === "edit") delete node.edited;
  node.feedback.latest = ["thumb", "comment", "edit", "choice"].find((other) => node.feedback[other]) ?? null;
  node.feedback.undone = !node.feedback.latest;
  save(state.chat);
  transcript.touch(node);
  drawPending();
}

outbox.addEventListener("change", ({ detail: { item, state: to, event, message } }) => {
  drawPending();
  if (!item.place) return;
  const chat = chatOf(item.place.chat);
  const node = chat?.nodes[item.place.node];
  const given = node?.feedback[item.place.slot];
  const vote = given?.votes.find((one) => one.key === item.key);
  if (!vote) return;
  if (event) vote.event = event;
  if (vote === given.votes.at(-1)) Object.assign(given, { state: to, message: message ?? "" });
  if (to === "refused") given.votes = given.votes.filter((other) => other !== vote); // there is nothing to take back
  save(chat);
  if (chat === state.chat) transcript.touch(node);
});
/** Votes whose acknowledgement never reached this conversation, because another tab wrote over it, ask for it again. */
function heal(chat) {
  for (const node of Object.values(chat.nodes)) {
    for (const slot of Object.keys(node.feedback ?? {})) {
      for (const vote of node.feedback[slot]?.votes ?? []) {
        if (vote.event == null) outbox.resend(vote, { chat: chat.id, node: node.id, slot });
      }
    }
  }
}

outbox.addEventListener("key", () => askForKey({ wrong: Boolean(recall("key")) }));

function drawPending() {
  const count = outbox.waiting;
  $("pending").hidden = count === 0;
  $("pending").textContent = count === 0 ? "" : t(count === 1 ? "vote.pending.one" : "vote.pending.many", { count });
}

/** The verdict on a pair: `left`, `right`, `tie`, `both_bad`, or `skipped`, which is no vote. */
function verdict(user, which) {
  const { left, right } = user.compare;
  const nodes = state.chat.nodes;
  user.compare.verdict = which;
  const [winner, loser] = which === "right" ? [nodes[right], nodes[left]] : [nodes[left], nodes[right]];
  state.chat.active[user.id] = winner.id;
  if (which !== "skipped") {
    const value = { over: [loser.response_id], ...(which === "tie" ? { tie: true } : {}), ...(which === "both_bad" ? { both_bad: true } : {}) };
    give(winner, "choice", { value: which }, { kind: "choice", value });
  }
  save(state.chat);
  draw();
  $("input").focus({ preventScroll: true });
}

/** Goes on with one answer of a pair; the other stays as its sibling. */
function proceed(user, node) {
  state.chat.active[user.id] = node.id;
  user.compare.closed = true;
  save(state.chat);
  draw();
  $("input").focus();
}

// --- where an answer comes from ---------------------------------------------------------------------------------------

function showSource(node) {
  const from = node.prairie ?? {};
  const tokens = node.tokens ?? {};
  const rows = [
    ["model", node.model],
    ["version", versionName(node)],
    ["artifact", from.artifact_id],
    ["weights", from.weights_hash],
    ["adapter", from.adapter_hash],
    ["fingerprint", node.fingerprint],
    ["response", node.response_id],
    ["sampling", Object.entries(node.sampling ?? {}).map(([name, value]) => `${name} ${value}`).join(", ")],
    ["tokens", tokens.completion == null ? null : t("source.tokens.value", { prompt: tokens.prompt ?? "?", completion: tokens.completion })],
    ["speed", node.speed ? t("source.speed.value", { speed: node.speed.toFixed(1), first: node.first_ms }) : null],
    ["time", time(node.created)],
  ];
  $("source").replaceChildren(...rows.filter(([, value]) => value).flatMap(([name, value]) => [h("dt", {}, t("source." + name)), h("dd", {}, value)]));
  $("source-dialog").showModal();
  showCounting(node);
}

/** What the server itself says of this browser's feedback on the answer; nothing when it cannot be asked. */
async function showCounting(node) {
  const { current } = await getFeedback(node.response_id).catch(() => ({ current: [] }));
  const mine = current.filter((event) => event.user === pseudonym());
  if (mine.length) $("source").append(h("dt", {}, t("source.feedback")), h("dd", {}, mine.map((event) => `${t("kind." + event.kind)} (${event.id})`).join(", ")));
}

// --- the list of conversations ----------------------------------------------------------------------------------------

function drawChats() {
  const wanted = $("search").value.trim().toLocaleLowerCase();
  const entries = chatIndex().filter((entry) => entry.title.toLocaleLowerCase().includes(wanted));
  const groups = new Map();
  for (const entry of entries) {
    const name = age(entry.updated);
    groups.set(name, [...(groups.get(name) ?? []), entry]);
  }
  const drawn = [...groups].flatMap(([name, members]) => [h("h3", {}, t("chats." + name)), h("ul", {}, members.map(chatRow))]);
  if (!entries.length) drawn.push(h("p", { class: "faint" }, t(wanted ? "chats.nomatch" : "chats.none")));
  $("chats").replaceChildren(...drawn);
}

function age(ms) {
  const midnight = new Date().setHours(0, 0, 0, 0);
  const days = Math.ceil((midnight - ms) / 86_400_000);
  return days <= 0 ? "today" : days === 1 ? "yesterday" : days <= 7 ? "week" : "older";
}

function chatRow(entry) {
  const row = h("li", { class: entry.id === state.chat.id ? "current" : null });
  row.append(
    h("button", { type: "button", class: "title", "aria-current": entry.id === state.chat.id ? "true" : null, onclick: () => openChat(chatOf(entry.id) ?? newChat()) }, entry.title || t("chats.untitled")),
    iconButton("pencil", "chats.rename", () => rename(row, entry)),
    iconButton("trash", "chats.delete", () => remove(entry)),
  );
  return row;
}

function rename(row, entry) {
  const field = h("input", { type: "text", value: entry.title, "aria-label": t("chats.rename"), maxlength: "120" });
  const finish = (keep) => {
    const chat = chatOf(entry.id);
    if (keep && chat && field.value.trim()) {
      chat.title = field.value.trim();
      save(chat);
    }
    draw();
  };
  field.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key === "Enter") finish(true);
    if (event.key === "Escape") finish(false);
  });
  field.addEventListener("blur", () => field.isConnected && finish(true));
  row.replaceChildren(field);
  field.select();
}

function remove(entry) {
  const chat = chatOf(entry.id);
  deleted.add(entry.id);
  state.streams.get(entry.id)?.controller.abort();
  deleteChat(entry.id);
  if (state.chat.id === entry.id) openChat(newChat());
  else drawChats();
  if (chat) {
    toast(t("chats.deleted"), t("action.undo"), () => {
      deleted.delete(chat.id);
      save(chat);
      drawChats();
    });
  }
}

function exportChat() {
  const text = JSON.stringify({ ...state.chat, messages: last(state.chat) ? messagesTo(state.chat, last(state.chat)) : [] }, null, 2);
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: `prairie-${state.chat.id.slice(0, 8)}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// --- models, settings, key --------------------------------------------------------------------------------------------

let away = null;
async function refreshModels() {
  try {
    state.models = (await listModels()).filter((model) => model.prairie?.writes !== false); // an encoder does not chat
    if (away) banner(null, t("server.back"));
    away = null;
    outbox.flush();
    if (!state.models.length) setTimeout(refreshModels, LOADING_MS); // the server is up, its models are still being read
  } catch (error) {
    if (error.status === 401) askForKey({ wrong: Boolean(recall("key")) });
    else {
      away = Math.min((away ?? 1000) * 2, 30_000);
      banner(t("server.away"));
      setTimeout(refreshModels, away);
    }
    return;
  }
  const names = state.models.map((model) => model.id);
  if (!names.includes(state.model)) state.model = names[0] ?? "";
  if (!names.includes(state.rival)) state.rival = SAME_MODEL;
  drawModels();
}

function drawModels() {
  const option = (value, text, chosen) => {
    const element = h("option", { value }, text);
    element.selected = chosen;
    return element;
  };
  const names = state.models.map((model) => model.id);
  const title = ({ id, prairie }) => (prairie?.version != null && !id.includes("@") ? `${id} @${prairie.version}` : id);
  $("model").replaceChildren(...(names.length ? state.models.map((model) => option(model.id, title(model), model.id === state.model)) : [option("", t("model.none"), true)]));
  $("rival").replaceChildren(
    option(SAME_MODEL, t("compare.same"), state.rival === SAME_MODEL),
    ...names.filter((name) => name !== state.model).map((name) => option(name, name, name === state.rival)),
  );
}

function drawSettings() {
  const { temperature, top_p, max_tokens } = state.sampling;
  $("temperature").value = temperature;
  $("temperature-value").value = temperature.toFixed(2);
  $("top-p").value = top_p;
  $("top-p-value").value = top_p.toFixed(2);
  $("max-tokens").value = max_tokens;
  $("key").value = recall("key", "");
  $("user").value = pseudonym();
}

function setSampling(changes) {
  Object.assign(state.sampling, changes);
  remember("sampling", state.sampling);
  drawSettings();
}

function showSettings(open) {
  $("settings").hidden = !open;
  $("open-settings").setAttribute("aria-expanded", String(open));
  document.body.classList.toggle("with-settings", open);
  drawVeil();
  (open ? $("close-settings") : $("open-settings")).focus();
}

function setKey(key) {
  if (key) remember("key", key);
  else forget("key");
  drawSettings();
}

function askForKey({ wrong = false } = {}) {
  const dialog = $("key-dialog");
  if (dialog.open) return;
  $("key-text").textContent = (wrong ? t("key.wrong") + " " : "") + t("key.text");
  $("asked-key").value = "";
  dialog.returnValue = ""; // Escape would leave what the last one said
  dialog.showModal();
}

// --- small things -----------------------------------------------------------------------------------------------------

function drawComposer() {
  const streaming = state.streams.has(state.chat.id);
  const focused = document.activeElement;
  $("stop").hidden = !streaming;
  $("send").hidden = streaming;
  $("send").disabled = !$("input").value.trim();
  if (focused === $("stop") && !streaming) $("input").focus();
  $("compare").setAttribute("aria-pressed", String(state.comparing));
  $("compare-strip").hidden = !state.comparing;
}

function scrollAlong() {
  const box = $("scroll");
  if (state.follow) box.scrollTop = box.scrollHeight;
  $("jump").hidden = state.follow || $("empty").hidden === false;
}

let toastTimer = null;
function toast(text, action = null, onclick = null) {
  const button = action && h("button", { type: "button", class: "text-button", onclick: () => { $("toast").hidden = true; onclick(); } }, action);
  $("toast").replaceChildren(...[h("span", {}, text), button].filter(Boolean));
  $("toast").hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => ($("toast").hidden = true), action ? 8000 : 4000);
}

function banner(text, then = null) {
  $("banner").hidden = !text;
  $("banner").textContent = text ?? "";
  if (then) toast(then);
}

function say(text) {
  $("live").textContent = text;
}

const narrow = matchMedia("(max-width: 860px)");
function showSidebar(open) {
  document.body.classList.toggle(narrow.matches ? "with-sidebar" : "without-sidebar", narrow.matches ? open : !open);
  drawVeil();
}
const sidebarShown = () => (narrow.matches ? document.body.classList.contains("with-sidebar") : !document.body.classList.contains("without-sidebar"));
const closeSidebarOnNarrow = () => narrow.matches && showSidebar(false);
function drawVeil() {
  $("veil").hidden = !(narrow.matches && (document.body.classList.contains("with-sidebar") || !$("settings").hidden));
}

const THEMES = ["auto", "light", "dark"];
function setTheme(theme) {
  remember("theme", theme);
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  drawTheme();
}
function drawTheme() {
  const theme = recall("theme", "auto");
  $("theme").replaceChildren(icon("theme-" + theme));
  $("theme").setAttribute("aria-label", t("theme." + theme));
  $("theme").title = t("theme." + theme);
}

function drawWords() {
  translate();
  drawTheme();
  drawPending();
  drawModels();
  $("examples").replaceChildren(...[1, 2, 3].map((n) => h("li", {}, h("button", { type: "button", class: "example", onclick: () => useExample(t(`empty.example.${n}`)) }, t(`empty.example.${n}`)))));
  transcript.show(state.chat, { fresh: true });
  draw();
}

function useExample(text) {
  $("input").value = text;
  fit($("input"));
  submit();
}

// --- wiring -----------------------------------------------------------------------------------------------------------

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("input").addEventListener("keydown", (event) => {
  if (!isSendKey(event)) return;
  event.preventDefault();
  submit();
});
$("input").addEventListener("input", () => {
  fit($("input"));
  $("send").disabled = !$("input").value.trim();
  remember("draft", $("input").value);
});
$("stop").addEventListener("click", stop);
$("new-chat").addEventListener("click", startChat);
$("search").addEventListener("input", drawChats);
$("export").addEventListener("click", exportChat);
$("language").addEventListener("click", () => {
  setLanguage(language() === "en" ? "zh" : "en");
  drawWords();
});
$("theme").addEventListener("click", () => setTheme(THEMES[(THEMES.indexOf(recall("theme", "auto")) + 1) % THEMES.length]));
$("toggle-sidebar").addEventListener("click", () => showSidebar(!sidebarShown()));
$("close-sidebar").addEventListener("click", () => showSidebar(false));
$("veil").addEventListener("click", () => {
  showSidebar(false);
  if (!$("settings").hidden) showSettings(false);
});
$("open-settings").addEventListener("click", () => showSettings($("settings").hidden));
$("close-settings").addEventListener("click", () => showSettings(false));
$("compare").addEventListener("click", () => {
  state.comparing = !state.comparing;
  remember("comparing", state.comparing);
  drawComposer();
});
$("model").addEventListener("change", () => {
  state.model = $("model").value;
  remember("model", state.model);
  if (state.rival === state.model) state.rival = SAME_MODEL;
  drawModels();
});
$("rival").addEventListener("change", () => {
  state.rival = $("rival").value;
  remember("rival", state.rival);
});
$("system").addEventListener("input", () => {
  state.chat.system = $("system").value;
  if (path(state.chat).length) save(state.chat, { soon: true });
});
$("temperature").addEventListener("input", () => setSampling({ temperature: Number($("temperature").value) }));
$("top-p").addEventListener("input", () => setSampling({ top_p: Number($("top-p").value) }));
$("max-tokens").addEventListener("change", () => setSampling({ max_tokens: Math.max(1, Math.round(Number($("max-tokens").value)) || DEFAULTS.max_tokens) }));
$("reset").addEventListener("click", () => setSampling(DEFAULTS));
$("key").addEventListener("change", () => {
  setKey($("key").value.trim());
  refreshModels();
});
$("key-dialog").addEventListener("close", () => {
  if ($("key-dialog").returnValue !== "save") return;
  setKey($("asked-key").value.trim());
  refreshModels();
  const end = last(state.chat);
  if (end?.status === "error" && !end.text) retry(end);
});
$("cancel-key").addEventListener("click", () => $("key-dialog").close());
$("jump").addEventListener("click", () => {
  state.follow = true;
  scrollAlong();
});
$("scroll").addEventListener("scroll", () => {
  const box = $("scroll");
  state.follow = box.scrollHeight - box.scrollTop - box.clientHeight < NEAR_THE_END_PX;
  $("jump").hidden = state.follow;
}, { passive: true });
addEventListener("keydown", (event) => {
  if (isComposing(event)) return;
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (!$("settings").hidden) showSettings(false);
    else if (document.body.classList.contains("with-sidebar")) showSidebar(false);
    else stop();
  }
  if (event.key.toLowerCase() === "o" && event.shiftKey && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    startChat();
  }
});
addEventListener("storage", (event) => {
  // Another tab wrote: show its conversations, and its version of the open one unless we are writing into it.
  if (event.key === "prairie.chats") drawChats();
  if (event.key === `prairie.chat.${state.chat.id}` && event.newValue && !state.streams.has(state.chat.id)) {
    state.chat = settle(JSON.parse(event.newValue));
    draw();
  }
  if (event.key?.startsWith("prairie.outbox.")) drawPending();
});
addEventListener("beforeunload", () => {
  for (const { chat } of state.streams.values()) save(chat);
});
document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && !away && refreshModels());
narrow.addEventListener("change", drawVeil);
// What is on the page settles after it was drawn (an answer comes into view, a panel opens): the end stays the end.
new ResizeObserver(scrollAlong).observe($("transcript"));
onStorageFull(() => toast(t("storage.full")));

const opened = loadChat(recall("open", ""));
if (opened) state.chat = settle(opened);
heal(state.chat);
$("input").value = recall("draft", "");
$("system").value = state.chat.system ?? "";
drawSettings();
drawWords();
fit($("input"));
scrollAlong();
refreshModels();
outbox.flush();
if (!narrow.matches) $("input").focus();
