// The board page: play a line's champion and watch it think. The server knows the rules; the page keeps the moves.
import { askPosition, goCurve, goLines, think } from "./api.js";
import { h } from "./dom.js";
import { curve, percent, refused, say, startPage, svg, table } from "./frame.js";
import { t } from "./i18n.js";
import { recall, remember } from "./storage.js";

const $ = (id) => document.getElementById(id);
const COLUMNS = "ABCDEFGHJKLMNOPQRST";
const CELL = 40;
const LOUD = 0.02; // chances below are not drawn

const state = {
  lines: null,
  curve: null,
  game: null, // {line, size, komi, visits, mine, moves}
  position: null,
  thought: null,
  thinking: null, // AbortController of the search under way
};

const vertex = (point, size) => `${COLUMNS[point % size]}${size - Math.floor(point / size)}`;
const champion = () => state.lines?.find((line) => line.line === $("line").value);

// --- the game -----------------------------------------------------------------------------------------------------------

async function begin() {
  stopThinking();
  const line = champion();
  if (!line) return;
  const size = line.boards[0] ?? 9;
  state.game = {
    line: line.line, size, komi: Number($("komi").value), visits: Number($("visits").value), mine: $("color").value, moves: [],
  };
  remember("go", { line: line.line, komi: state.game.komi, visits: state.game.visits, mine: state.game.mine });
  await go([]);
}

/** The game is these moves now; if the line is to move it thinks and moves. */
async function go(moves) {
  const game = state.game;
  try {
    const position = await askPosition({ size: game.size, komi: game.komi, moves });
    if (state.game !== game) return;
    game.moves = moves;
    state.position = position;
    say("");
    draw();
    if (!position.over && position.to_move !== game.mine && game.mine !== "none") await answer(game);
  } catch (error) {
    refused(error);
    draw();
  }
}

async function answer(game) {
  const move = await search(game);
  if (move !== null && state.game === game) await go([...game.moves, move]);
}

/** What the line would play here; null when the search was called off. */
async function search(game) {
  stopThinking();
  const mine = new AbortController();
  state.thinking = mine;
  state.thought = null;
  draw();
  try {
    const { size, komi, visits, moves, line } = game;
    await think({ model: line, size, komi, visits, moves }, mine.signal, (thought) => {
      if (state.thinking !== mine) return;
      state.thought = thought;
      draw();
    });
    return state.thinking === mine ? (state.thought?.move ?? null) : null;
  } catch (error) {
    refused(error);
    return null;
  } finally {
    if (state.thinking === mine) state.thinking = null;
    draw();
  }
}

function stopThinking() {
  state.thinking?.abort();
  state.thinking = null;
}

function mayMove() {
  const { game, position } = state;
  return game && position && !position.over && !state.thinking && (game.mine === "none" || position.to_move === game.mine);
}

function play(move) {
  if (!mayMove() || !state.position.legal.includes(move)) return;
  state.thought = null;
  go([...state.game.moves, move]);
}

function undo() {
  const { game } = state;
  if (!game?.moves.length) return;
  stopThinking();
  state.thought = null;
  let left = game.moves.length - 1;
  const black = (count) => (count % 2 === 0 ? "black" : "white"); // whose turn it is after so many moves
  if (game.mine !== "none" && left > 0 && black(left) !== game.mine) left -= 1;
  go(game.moves.slice(0, left));
}

// --- drawing ------------------------------------------------------------------------------------------------------------

function draw() {
  drawBoard();
  drawTurn();
  drawThought();
  drawCurve();
  $("pass").disabled = !mayMove();
  $("hint").disabled = !mayMove();
  $("undo").disabled = !state.game?.moves.length;
}

function drawBoard() {
  const { position, thought } = state;
  if (!position) return $("board").replaceChildren();
  const size = position.size;
  const side = CELL * (size + 1);
  const at = (k) => CELL * (k + 1);
  const parts = [svg("rect", { x: 0, y: 0, width: side, height: side, rx: 10, class: "wood" })];
  for (let k = 0; k < size; k++) {
    parts.push(
      svg("line", { x1: at(0), x2: at(size - 1), y1: at(k), y2: at(k), class: "cross" }),
      svg("line", { y1: at(0), y2: at(size - 1), x1: at(k), x2: at(k), class: "cross" }),
      svg("text", { x: at(k), y: side - 6, "text-anchor": "middle", class: "edge" }, COLUMNS[k]),
      svg("text", { x: 12, y: at(k) + 4, "text-anchor": "middle", class: "edge" }, String(size - k)),
    );
  }
  const last = position.moves.at(-1);
  const owners = position.over ? position.owners : thought && $("show-owner").checked ? thought.owner : null;
  position.stones.forEach((stone, point) => {
    const [x, y, name] = [at(point % size), at(Math.floor(point / size)), vertex(point, size)];
    if (stone) {
      parts.push(svg("circle", { cx: x, cy: y, r: CELL * 0.46, class: stone === 1 ? "black" : "white" }));
      if (name === last) parts.push(svg("circle", { cx: x, cy: y, r: CELL * 0.2, class: "last" }));
    }
    const owner = owners?.[point] ?? 0;
    if (Math.abs(owner) > 0.1) {
      const half = CELL * 0.17 * Math.abs(owner);
      parts.push(svg("rect", { x: x - half, y: y - half, width: 2 * half, height: 2 * half, class: owner > 0 ? "owned-black" : "owned-white" }));
    }
    const chance = !stone && !position.over && thought && $("show-policy").checked ? thought.policy[point] : 0;
    if (chance > LOUD) {
      parts.push(
        svg("circle", { cx: x, cy: y, r: CELL * 0.42, class: name === thought.move ? "wish best" : "wish", "fill-opacity": 0.15 + 0.75 * chance }),
        svg("text", { x, y: y + 4, "text-anchor": "middle", class: "chance" }, String(Math.round(100 * chance))),
      );
    }
    if (!stone && mayMove() && position.legal.includes(name)) {
      parts.push(svg("rect", { x: x - CELL / 2, y: y - CELL / 2, width: CELL, height: CELL, class: "spot", "data-move": name, role: "button", "aria-label": name, onclick: () => play(name) }));
    }
  });
  $("board").replaceChildren(svg("svg", { viewBox: `0 0 ${side} ${side}`, class: "goban", "data-over": String(position.over), "data-moves": position.moves.length, "aria-label": t("go.board") }, parts));
}

function drawTurn() {
  const { position } = state;
  for (const node of document.querySelectorAll(".needs-line")) node.hidden = state.lines?.length === 0;
  const link = $("sgf");
  link.hidden = !position?.moves.length;
  if (position) link.setAttribute("href", "data:application/x-go-sgf," + encodeURIComponent(position.sgf));
  if (!position) return void ($("turn").textContent = state.lines?.length === 0 ? t("go.none") : "");
  if (position.over) {
    const points = Math.abs(position.score);
    $("turn").textContent = points === 0 ? t("go.draw") : t(position.score > 0 ? "go.black.won" : "go.white.won", { n: points });
    return;
  }
  const passed = position.moves.at(-1) === "pass" ? t("go.passed") + " " : "";
  $("turn").textContent = passed + t(state.thinking ? "go.thinking" : position.to_move === "black" ? "go.black.turn" : "go.white.turn");
}

function drawThought() {
  const { thought } = state;
  if (!thought) return $("value").replaceChildren(h("p", { class: "faint" }, t("go.quiet"))), $("candidates").replaceChildren();
  const lead = thought.black_leads;
  $("value").replaceChildren(
    svg("svg", { viewBox: "0 0 100 8", class: "scale", preserveAspectRatio: "none", "aria-hidden": "true" },
      svg("rect", { x: 0, y: 0, width: 100, height: 8, class: "white" }),
      svg("rect", { x: 0, y: 0, width: 100 * thought.black_wins, height: 8, class: "black" })),
    h("p", {}, t("go.value", { wins: percent(thought.black_wins), lead: (lead > 0 ? "+" : "") + lead.toFixed(1), visits: thought.visits, model: thought.model })),
  );
  $("candidates").replaceChildren(
    table([t("go.move"), t("go.looked"), t("go.wins"), t("go.plan")],
      thought.candidates.slice(0, 5).map((c) => [c.move, String(c.visits), percent(c.win), c.line.slice(0, 6).join(" ")])));
}

function drawCurve() {
  const turns = state.curve?.turns ?? [];
  $("curve").replaceChildren(turns.length ? curve(turns) : h("p", { class: "faint" }, t("go.curve.none")));
}

// --- beginning ----------------------------------------------------------------------------------------------------------

async function chosen() {
  try {
    state.curve = champion() ? await goCurve($("line").value) : null;
  } catch (error) {
    refused(error);
  }
  draw();
}

async function load() {
  const kept = recall("go", {});
  try {
    state.lines = await goLines();
  } catch (error) {
    return refused(error);
  }
  say("");
  $("line").replaceChildren(...state.lines.map((line) => h("option", { value: line.line }, line.champion)));
  if (state.lines.some((line) => line.line === kept.line)) $("line").value = kept.line;
  await chosen();
  if (!state.game) await begin();
}

const kept = recall("go", {});
$("komi").value = kept.komi ?? 0.5;
$("visits").value = kept.visits ?? 200;
$("color").value = kept.mine ?? "black";
$("terms").addEventListener("submit", (event) => {
  event.preventDefault();
  begin();
});
$("line").addEventListener("change", chosen);
$("pass").addEventListener("click", () => play("pass"));
$("undo").addEventListener("click", undo);
$("hint").addEventListener("click", () => mayMove() && search(state.game));
for (const id of ["show-policy", "show-owner"]) $(id).addEventListener("change", draw);
startPage(() => (state.lines === null ? load() : draw()));
