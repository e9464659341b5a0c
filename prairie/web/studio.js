// The studio: what the wheel did and does. Reads the store by HTTP; two buttons, for administrators.
import { promote, rollBack, studio } from "./api.js";
import { h } from "./dom.js";
import { percent, refused, say, startPage, svg, table } from "./frame.js";
import { t, time } from "./i18n.js";
import { pseudonym } from "./storage.js";

const $ = (id) => document.getElementById(id);
const EVERY_MS = 4000;
// What the server told of each part; null until it did. The parts come and are drawn each for itself.
const seen = { lines: null, turns: null, traffic: null, votes: null, mine: null, lineage: null };
let chosen = null; // the version whose lineage is shown
let loading = null; // the promise of the reading under way

function load() {
  loading ??= read().catch(refused).finally(() => (loading = null));
  return loading;
}

async function read() {
  const put = (part) => (found) => {
    seen[part] = found.data ?? found;
    draw();
  };
  await Promise.all([
    studio("lines").then(put("lines")).then(readTurns),
    studio("traffic").then(put("traffic")),
    studio("votes").then(put("votes")),
    studio(`votes?user=${encodeURIComponent(pseudonym())}`).then(put("mine")),
  ]);
}

async function readTurns() {
  const turned = seen.lines.filter((line) => line.turns);
  const rows = await Promise.all(turned.map(async ({ line }) => [line, (await studio(`turns/${encodeURIComponent(line)}`)).data]));
  seen.turns = new Map(rows);
  const first = turned[0] ?? seen.lines[0];
  chosen ??= first?.champion ? `${first.line}@${first.champion}` : null;
  await readLineage();
}

async function readLineage() {
  seen.lineage = chosen ? await studio(`lineage/${encodeURIComponent(chosen)}`) : { nodes: [], arrows: [] };
  draw();
}

async function change(act) {
  try {
    const made = await act();
    await loading;
    await load();
    say(t("studio.changed", { name: made.champion }));
  } catch (error) {
    refused(error);
  }
}

function draw() {
  part("lines", seen.lines, (lines) => lines.map(drawLine));
  part("turns", seen.turns && seen.lines, () => {
    const turns = [...seen.turns].flatMap(([line, rows]) => rows.map((turn) => drawTurn(line, turn)));
    return turns.length ? turns : [h("p", { class: "faint" }, t("studio.turns.none"))];
  });
  part("mine", seen.mine, (events) => [fates(events)]);
  part("traffic", seen.traffic, drawTraffic);
  part("votes", seen.votes, drawVotes);
  part("lineage", seen.lineage, drawLineage);
}

/** A part of the page, or that it is still awaited. */
function part(id, known, drawn) {
  $(id).setAttribute("aria-busy", String(known === null));
  $(id).replaceChildren(...(known === null ? [h("p", { class: "faint" }, t("studio.loading"))] : drawn(known)));
}

function drawLine(line) {
  const named = (number) => `${line.line}@${number}`;
  const rows = [...line.versions].reverse().map((version) => {
    const champion = version.number === line.champion;
    return [
      h("button", { type: "button", class: "text-button", onclick: () => show(version.name) }, version.name),
      time(version.created * 1000),
      champion
        ? h("span", { class: "badge" }, t("studio.champion"))
        : h("button", { type: "button", class: "text-button promote", onclick: () => confirm(t("studio.promote.sure", { name: version.name })) && change(() => promote(line.line, version.number)) }, t("studio.promote")),
    ];
  });
  const events = line.history.slice(-4).map((event) =>
    h("li", {}, t(event.action === "promote" ? "studio.promoted" : "studio.rolled", { name: named(event.number), when: time(event.created * 1000), why: event.why ?? event.who ?? "" })));
  return h("article", { class: "card", "data-line": line.line },
    h("div", { class: "row" },
      h("h2", {}, line.line),
      h("button", { type: "button", class: "text-button rollback", onclick: () => confirm(t("studio.rollback.sure", { name: line.line })) && change(() => rollBack(line.line)) }, t("studio.rollback"))),
    line.waits_for ? h("p", { class: "waits" }, t("studio.waits_for", { name: line.waits_for, line: line.line })) : null,
    table([t("studio.version"), t("studio.made"), ""], rows),
    h("ul", { class: "faint" }, events));
}

function drawTurn(line, turn) {
  const verdict = turn.verdict;
  const known = verdict.win_rate !== null && verdict.win_rate !== undefined;
  return h("article", { class: "card turned", "data-line": line, "data-turn": turn.number },
    h("div", { class: "row" },
      h("h2", {}, t("studio.turn", { line, n: turn.number })),
      h("span", { class: turn.promoted ? "badge" : "badge no" }, t(turn.promoted ? "studio.was_promoted" : "studio.was_refused"))),
    h("p", {}, t("studio.match", { candidate: turn.candidate_name ?? "?", champion: turn.champion_name ?? "?" })),
    known ? interval(verdict.win_rate, verdict.low, verdict.high) : null,
    h("p", {}, t(verdict.trials === "games" ? "studio.games" : "studio.people", { n: verdict.n, users: verdict.users, rows: turn.rows ?? 0, votes: turn.votes })),
    verdict.reasons?.length ? h("ul", { class: "faint reasons" }, reasons(verdict).map((reason) => h("li", {}, reason))) : null,
    h("small", {}, time(turn.created * 1000)));
}

/** Why the candidate was refused, in the page's language; verdicts from before there were rules in them say it in English. */
function reasons(verdict) {
  if (!verdict.because?.length) return verdict.reasons;
  return verdict.because.map(({ rule, figures }) => t("because." + rule, { ...figures, probe: probe(figures.probe) }));
}

/** The name of a probe, as the gate writes it, in the page's language where that has one. */
function probe(name) {
  const found = t("probe." + name);
  return found === "probe." + name ? name : found;
}

/** A win rate with its interval, against the middle that it had to leave. */
function interval(rate, low, high) {
  return h("div", { class: "row" },
    svg("svg", { viewBox: "0 0 200 16", class: "interval", role: "img", "aria-label": percent(rate, 1) },
      svg("line", { x1: 0, x2: 200, y1: 8, y2: 8, class: "grid" }),
      svg("line", { x1: 100, x2: 100, y1: 1, y2: 15, class: "middle" }),
      svg("line", { x1: 200 * low, x2: 200 * high, y1: 8, y2: 8, class: "span" }),
      svg("circle", { cx: 200 * rate, cy: 8, r: 4.5, class: "promoted" })),
    h("span", { class: "number" }, `${percent(rate, 1)} [${percent(low, 1)}, ${percent(high, 1)}]`));
}

function fates(events) {
  if (!events.length) return h("p", { class: "faint" }, t("studio.votes.none"));
  return table([t("studio.when"), t("studio.kind"), t("studio.line"), t("studio.fate")],
    events.map((event) => [time(event.created * 1000), t("kind." + event.kind) + (event.thumb ? ` ${t("studio." + event.thumb)}` : ""), event.line ?? event.model, fate(event)]));
}

/** "Your vote was used in turn 3", and for what. */
function fate(event) {
  if (event.used.length) {
    return h("span", { class: "fate used" }, event.used.map((turn) =>
      t(turn.promoted ? "studio.used.promoted" : "studio.used.refused", { n: turn.turn, candidate: turn.candidate })).join(" "));
  }
  return h("span", { class: "fate" }, event.passed_by.length ? t("studio.passed", { n: event.passed_by.at(-1) }) : t("studio.waits"));
}

function drawTraffic({ bars, versions, latest, pending, minutes }) {
  const most = Math.max(4, ...bars.map((bar) => Math.max(bar.answers, bar.votes)));
  const wide = 12;
  const part = (k, count, from, name) => svg("rect", { x: k * wide + 1 + from, y: 80 - (76 * count) / most, width: 5, height: (76 * count) / most, class: name });
  const name = (row) => (seen.lines ?? []).flatMap((line) => line.versions).find((version) => version.artifact_id === row.artifact_id)?.name ?? row.line ?? row.model;
  return [
    h("p", {}, t("studio.now", { pending, answers: bars.reduce((sum, bar) => sum + bar.answers, 0), votes: bars.reduce((sum, bar) => sum + bar.votes, 0), minutes })),
    svg("svg", { viewBox: `0 0 ${wide * bars.length} 82`, class: "plot bars", role: "img", "aria-label": t("studio.traffic") },
      bars.map((bar, k) => [part(k, bar.answers, 0, "answers"), part(k, bar.votes, 5, "votes")])),
    h("p", { class: "legend" }, h("i", { class: "answers" }), t("studio.answers"), h("i", { class: "votes" }), t("studio.votes")),
    table([t("studio.version"), t("studio.answers"), t("studio.aborted"), t("studio.median")],
      versions.map((row) => [name(row), String(row.answers), String(row.aborted), row.median_ms === null ? "" : `${row.median_ms} ms`])),
    h("details", {}, h("summary", {}, t("studio.latest")),
      table([t("studio.when"), t("studio.version"), t("studio.state"), t("studio.tokens"), "ms"],
        latest.slice(0, 15).map((row) => [time(row.created * 1000), name(row), row.status, String(row.tokens), row.latency_ms === null ? "" : String(Math.round(row.latency_ms))]))),
  ];
}

function drawVotes({ current, thumbs, users, latest }) {
  const counts = Object.entries(current).map(([kind, n]) => `${t("kind." + kind)} ${n}`).join(" · ");
  return [
    h("p", {}, t("studio.counts", { users, up: thumbs.up ?? 0, down: thumbs.down ?? 0 }), " ", h("span", { class: "faint" }, counts)),
    fates(latest.slice(0, 12)),
  ];
}

// --- lineage ------------------------------------------------------------------------------------------------------------

async function show(name) {
  chosen = name;
  try {
    await readLineage();
  } catch (error) {
    return refused(error);
  }
  $("lineage").scrollIntoView({ block: "nearest" });
}

/** What a version was made from, left to right: data and older models, then what they made. */
function drawLineage(graph) {
  if (!graph.nodes.length) return [h("p", { class: "faint" }, t("studio.lineage.none"))];
  const [wide, high, gap] = [150, 44, 26];
  const deepest = Math.max(...graph.nodes.map((node) => node.depth));
  const columns = Array.from({ length: deepest + 1 }, () => []);
  for (const node of graph.nodes) columns[deepest - node.depth].push(node);
  const places = new Map();
  columns.forEach((nodes, column) => nodes.forEach((node, row) => places.set(node.id, [column * (wide + 46), row * (high + gap)])));
  const rows = Math.max(...columns.map((nodes) => nodes.length));
  const [width, height] = [columns.length * (wide + 46), rows * (high + gap)];
  const arrows = graph.arrows.map(([from, to]) => {
    const [[x1, y1], [x2, y2]] = [places.get(from), places.get(to)];
    const [start, end] = [x1 + wide, (y) => y + high / 2];
    return svg("path", { d: `M${start} ${end(y1)}C${start + 24} ${end(y1)} ${x2 - 24} ${end(y2)} ${x2} ${end(y2)}`, class: "arrow" });
  });
  const boxes = graph.nodes.map((node) => {
    const [x, y] = places.get(node.id);
    const about = node.events ? t("studio.events", { n: node.events }) : node.rows ? t("studio.rows", { n: node.rows }) : node.kind;
    return svg("g", { class: node.version ? "node model" : "node" },
      svg("rect", { x, y, width: wide, height: high, rx: 8 }),
      svg("text", { x: x + 10, y: y + 18, class: "name" }, node.version ?? node.name.slice(0, 18)),
      svg("text", { x: x + 10, y: y + 35 }, about),
      svg("title", {}, `${node.kind} ${node.name} ${node.id}`));
  });
  return [
    h("p", {}, graph.name),
    h("div", { class: "graph" }, svg("svg", { viewBox: `-2 -2 ${width} ${height}`, width, height, role: "img", "aria-label": t("studio.lineage") }, arrows, boxes)),
  ];
}

const refresh = () => document.visibilityState === "visible" && seen.traffic && load();
startPage(() => (draw(), load()));
setInterval(refresh, EVERY_MS);
document.addEventListener("visibilitychange", refresh);
