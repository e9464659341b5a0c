// The conversation on the page: one view per message, patched in place. A token redraws the last block of one answer;
// an acknowledged vote changes one line; so a text field that is being written in (with an input method, say) is never
// rebuilt under the writer's hands.
// Views only draw and call `actions`; what a click means is app.js's business.
import { path, shown, siblings, versionName } from "./chat.js";
import { copyButton, fit, h, icon, iconButton, isComposing, languageOf } from "./dom.js";
import { t } from "./i18n.js";
import { renderMarkdown } from "./markdown.js";

export const REASONS = ["wrong", "style", "too_long", "unsafe", "not_followed"];

const PAGE = 60; // messages that are on the page at once; earlier ones come when they are asked for

export class Transcript {
  #views = new Map();
  #room = PAGE;
  #dirty = new Set();
  #frame = null;

  constructor(container, actions) {
    Object.assign(this, { container, actions, chat: null });
  }

  /** Draws `chat`; views of messages that stay are kept as they are. */
  show(chat, { fresh = chat !== this.chat } = {}) {
    if (fresh) {
      this.#views.clear();
      this.container.replaceChildren();
    }
    if (chat !== this.chat) this.#room = PAGE;
    this.chat = chat;
    const nodes = path(chat);
    const first = Math.max(0, nodes.length - this.#room);
    const wanted = [];
    let before = null; // the answer above, to say when the model changed between two answers
    nodes.forEach((node, at) => {
      if (at >= first) wanted.push(this.#viewOf(node, before));
      if (node.role === "assistant") before = node;
    });
    for (const view of wanted) view.update();
    this.#place([...(first ? [this.#earlier(first)] : []), ...wanted.map((view) => view.element)]);
  }

  /** Brings the page's children to `elements` with as few moves as it takes. */
  #place(elements) {
    const { container } = this;
    elements.forEach((element, at) => {
      if (container.children[at] !== element) container.insertBefore(element, container.children[at] ?? null);
    });
    while (container.children.length > elements.length) container.lastElementChild.remove();
  }

  #earlier(count) {
    return h("button", { type: "button", class: "text-button earlier", onclick: () => this.#showEarlier() }, icon("up-arrow"), t("transcript.earlier", { count }));
  }

  /** More of what was said before, with the eye kept on the message that was on top. */
  #showEarlier() {
    const box = this.container.parentElement;
    const below = box.scrollHeight - box.scrollTop;
    this.#room += PAGE;
    this.show(this.chat);
    box.scrollTop = box.scrollHeight - below;
  }

  #viewOf(node, before) {
    const user = this.chat.nodes[node.parent];
    const inPair = node.role === "assistant" && user?.compare && !user.compare.closed;
    const key = inPair ? "pair " + user.id : node.id;
    let view = this.#views.get(key);
    if (!view) {
      const Kind = inPair ? PairView : node.role === "user" ? UserView : AnswerView;
      view = new Kind(this.chat, inPair ? user : node, this.actions);
      this.#views.set(key, view);
    }
    view.before = before;
    return view;
  }

  /** Patches what shows `node`, at most once per frame (a hidden page has no frames: then once per 100 ms). */
  touch(node) {
    this.#dirty.add(node.id);
    if (this.#frame !== null) return;
    const draw = () => {
      this.#frame = null;
      this.settle();
    };
    this.#frame = document.hidden ? setTimeout(draw, 100) : requestAnimationFrame(draw);
  }

  settle() {
    for (const id of this.#dirty) {
      const parent = this.chat?.nodes[id]?.parent;
      for (const key of [id, "pair " + id, "pair " + parent]) this.#views.get(key)?.update();
    }
    this.#dirty.clear();
    this.onDrawn?.();
  }
}

/** `< 2/3 >`: the versions of one message. */
function stepper(chat, node, actions) {
  const count = h("span", { class: "count" });
  const previous = iconButton("left", "action.previous", () => actions.step(node, -1));
  const next = iconButton("right", "action.next", () => actions.step(node, 1));
  const element = h("span", { class: "stepper" }, previous, count, next);
  return {
    element,
    update() {
      const ids = siblings(chat, node);
      const at = ids.indexOf(node.id);
      element.hidden = ids.length < 2;
      count.textContent = `${at + 1}/${ids.length}`;
      previous.disabled = at === 0;
      next.disabled = at === ids.length - 1;
    },
  };
}

/** A text area with save and cancel; Ctrl+Enter saves, Escape cancels, neither while an input method composes. */
function editor({ label, hint, save, onsave, oncancel }) {
  const area = h("textarea", { rows: "3", "aria-label": label });
  const submit = () => area.value.trim() && onsave(area.value);
  area.addEventListener("input", () => fit(area));
  area.addEventListener("keydown", (event) => {
    if (isComposing(event)) return;
    if (event.key === "Escape") {
      event.stopPropagation();
      oncancel();
    } else if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      submit();
    }
  });
  const element = h(
    "div", { class: "editor", hidden: true }, area, hint && h("small", {}, hint),
    h("div", { class: "buttons" },
      h("button", { type: "button", class: "text-button", onclick: oncancel }, t("action.cancel")),
      h("button", { type: "button", class: "primary", onclick: submit }, save)),
  );
  return {
    element,
    open(text) {
      element.hidden = false;
      area.value = text;
      fit(area);
      area.focus();
    },
    close() {
      element.hidden = true;
    },
  };
}

class UserView {
  constructor(chat, node, actions) {
    Object.assign(this, { node });
    this.text = h("div", { class: "said" });
    this.stepper = stepper(chat, node, actions);
    this.pencil = iconButton("pencil", "action.edit_message", () => this.#edit());
    this.tools = h("div", { class: "tools" }, this.stepper.element, copyButton("action.copy", () => node.text), this.pencil);
    this.editor = editor({
      label: t("composer.label"),
      save: t("action.resend"),
      onsave: (text) => {
        this.#close();
        actions.branch(node, text);
      },
      oncancel: () => this.#close(),
    });
    this.element = h("article", { class: "turn user", "data-node": node.id }, h("h2", { class: "unseen" }, t("role.user")), this.text, this.editor.element, this.tools);
  }

  #edit() {
    this.text.hidden = this.tools.hidden = true;
    this.editor.open(this.node.text);
  }

  #close() {
    this.text.hidden = this.tools.hidden = false;
    this.editor.close();
    this.pencil.focus();
  }

  update() {
    this.text.textContent = this.node.text; // never changes: an edit is a branch
    this.text.lang = languageOf(this.node.text);
    this.stepper.update();
  }
}

/** The text of an answer with what became of it (writing, stopped, cut, failed); shared by AnswerView and PairView. */
class AnswerBody {
  constructor(node, actions) {
    this.node = node;
    this.text = h("div", { class: "markdown" });
    this.waiting = h("p", { class: "thinking" }, h("i"), h("i"), h("i"), h("span", { class: "unseen" }, t("answer.thinking")));
    this.words = h("span");
    this.retry = h("button", { type: "button", class: "text-button", onclick: () => actions.retry(node) }, icon("again"), t("answer.retry"));
    this.state = h("p", { class: "answer-state" }, this.words, this.retry);
    this.element = h("div", { class: "body" }, this.text, this.waiting, this.state);
  }

  update() {
    const { node } = this;
    const text = shown(node);
    if (this.drawn !== text) {
      renderMarkdown(this.text, text);
      this.text.lang = languageOf(text);
    }
    this.drawn = text;
    this.element.classList.toggle("writing", node.status === "streaming" && text !== "");
    this.waiting.hidden = node.status !== "streaming" || text !== "";
    this.words.textContent = this.#say(text);
    this.retry.hidden = node.status !== "error";
    this.state.hidden = !this.words.textContent;
    this.state.classList.toggle("failed", node.status === "error");
  }

  #say(text) {
    const { node } = this;
    if (node.unreached) return t("answer.unreached");
    if (node.status === "error") return node.error ? t("answer.failed", { message: node.error }) : t("answer.broken");
    if (node.edited != null) return ""; // what became of the model's own words matters no more
    if (node.status === "stopped") return t("answer.stopped");
    if (node.status === "done" && node.finish_reason === "length") return t("answer.length");
    if (node.status === "done" && !text) return t("answer.empty");
    return "";
  }
}

/** `spark@3 · 41 tokens/s`; a click shows the whole provenance. */
function origin(node, actions) {
  const element = h("button", { type: "button", class: "origin", title: t("answer.version"), onclick: () => actions.source(node) });
  return {
    element,
    update() {
      const speed = node.speed ? ` · ${t("answer.speed", { speed: node.speed >= 10 ? Math.round(node.speed) : node.speed.toFixed(1) })}` : "";
      element.textContent = versionName(node) + speed;
      element.hidden = node.status === "streaming" || !node.response_id;
    },
  };
}

/** One line: saving, saved, waiting or refused, with undo. */
function voteState(node, actions) {
  const mark = h("span", { class: "vote-mark" });
  const words = h("span");
  const undo = h("button", { type: "button", class: "text-button", onclick: () => actions.undo(node, node.feedback.latest) }, t("action.undo"));
  const element = h("span", { class: "vote-state", role: "status" }, mark, words, undo);
  return {
    element,
    update() {
      const given = node.feedback?.[node.feedback.latest];
      const state = given?.state ?? (node.feedback?.undone ? "undone" : null);
      element.hidden = !state;
      if (!state) return;
      if (element.dataset.state !== state) mark.replaceChildren(...(state === "saved" ? [icon("check")] : []));
      element.dataset.state = state;
      words.textContent = t("vote." + state, { message: given?.message ?? "" });
      undo.hidden = state === "undone" || state === "refused";
    },
  };
}

class AnswerView {
  constructor(chat, node, actions) {
    Object.assign(this, { chat, node, actions, before: null });
    this.note = h("p", { class: "updated-note", hidden: true });
    this.body = new AnswerBody(node, actions);
    this.corrected = h("p", { class: "corrected" }, icon("pencil"), t("answer.edited"));
    this.stepper = stepper(chat, node, actions);
    this.origin = origin(node, actions);
    this.state = voteState(node, actions);
    this.up = iconButton("up", "action.up", () => actions.thumb(node, "up", []));
    this.down = iconButton("down", "action.down", () => actions.thumb(node, "down", []));
    this.talk = iconButton("comment", "action.comment", () => this.#toggleComment(), { "aria-expanded": "false" });
    this.pencil = iconButton("pencil", "action.edit_answer", () => this.#edit());
    this.again = iconButton("again", "action.regenerate", () => actions.regenerate(node));
    this.copy = copyButton("action.copy", () => shown(node));
    this.tools = h("div", { class: "tools" }, this.stepper.element, this.copy, this.again, this.pencil, this.up, this.down, this.talk);
    this.foot = h("footer", { class: "foot" }, this.tools, this.origin.element, this.state.element);
    this.#buildPanel();
    this.editor = editor({
      label: t("edit.label"),
      hint: t("edit.hint"),
      save: t("action.save_edit"),
      onsave: (text) => {
        this.#closeEditor();
        if (text !== shown(node)) actions.edit(node, text);
      },
      oncancel: () => this.#closeEditor(),
    });
    this.element = h("article", { class: "turn assistant", "data-node": node.id }, h("h2", { class: "unseen" }, t("role.assistant")), this.note, this.body.element, this.editor.element, this.corrected, this.foot, this.panel);
  }

  #buildPanel() {
    const { node } = this;
    this.chips = REASONS.map((reason) =>
      h("button", { type: "button", class: "chip", "data-reason": reason, "aria-pressed": "false", onclick: () => this.#toggleReason(reason) }, t("reason." + reason)));
    this.reasons = h("div", { class: "reasons", role: "group", "aria-label": t("reasons.title") }, h("span", { class: "question" }, t("reasons.title")), this.chips);
    this.comment = h("textarea", { rows: "1", "aria-label": t("comment.label"), placeholder: t("comment.placeholder") });
    this.sendComment = h("button", { type: "button", class: "text-button", "aria-label": t("comment.send"), onclick: () => this.#comment() }, t("composer.send"));
    this.comment.addEventListener("input", () => fit(this.comment));
    this.comment.addEventListener("keydown", (event) => {
      if (isComposing(event) || event.key !== "Enter" || event.shiftKey) return;
      event.preventDefault();
      this.#comment();
    });
    this.said = h("p", { class: "comment-said" });
    this.panel = h("div", { class: "panel", hidden: true }, this.reasons, this.said, h("div", { class: "comment" }, this.comment, this.sendComment));
    this.open = false; // a reload does not open what was given before
    this.wasDown = node.feedback?.thumb?.value === "down";
  }

  #toggleReason(reason) {
    const had = this.node.feedback.thumb?.value === "down" ? this.node.feedback.thumb.reasons : [];
    this.actions.thumb(this.node, "down", had.includes(reason) ? had.filter((other) => other !== reason) : [...had, reason], { reasonsChanged: true });
  }

  #toggleComment() {
    this.open = this.panel.hidden;
    this.update();
    if (this.open) this.comment.focus();
  }

  #comment() {
    const text = this.comment.value.trim();
    if (!text) return;
    this.comment.value = "";
    fit(this.comment);
    this.open = true;
    this.actions.comment(this.node, text);
  }

  #edit() {
    this.body.element.hidden = this.foot.hidden = this.panel.hidden = true;
    this.editing = true;
    this.editor.open(shown(this.node));
  }

  #closeEditor() {
    this.editing = false;
    this.body.element.hidden = this.foot.hidden = false;
    this.editor.close();
    this.update();
    this.pencil.focus();
  }

  update() {
    const { node } = this;
    const feedback = node.feedback ?? {};
    this.body.update();
    this.stepper.update();
    this.origin.update();
    this.state.update();
    const busy = node.status === "streaming";
    const votable = !busy && Boolean(node.response_id);
    this.foot.hidden = busy || this.editing === true;
    this.copy.hidden = this.again.hidden = node.status === "error" && !shown(node);
    this.up.hidden = this.down.hidden = this.talk.hidden = this.pencil.hidden = !votable;
    this.up.setAttribute("aria-pressed", String(feedback.thumb?.value === "up"));
    this.down.setAttribute("aria-pressed", String(feedback.thumb?.value === "down"));
    this.corrected.hidden = node.edited == null || this.editing === true;
    const down = feedback.thumb?.value === "down";
    // The panel opens with a thumb down and is left as the reader put it afterwards.
    if (down !== this.wasDown) this.open = down;
    this.wasDown = down;
    this.panel.hidden = !this.open || !votable || this.editing === true;
    this.talk.setAttribute("aria-expanded", String(!this.panel.hidden));
    this.reasons.hidden = !down;
    for (const chip of this.chips) chip.setAttribute("aria-pressed", String(Boolean(down && feedback.thumb.reasons.includes(chip.dataset.reason))));
    this.said.textContent = feedback.comment?.value ?? "";
    this.said.hidden = !feedback.comment;
    this.#noteUpdate();
  }

  #noteUpdate() {
    const { before, node } = this;
    const changed = before?.prairie?.line && before.prairie.line === node.prairie?.line && versionName(before) !== versionName(node);
    this.note.hidden = !changed;
    if (changed) this.note.textContent = t("answer.updated", { before: versionName(before), after: versionName(node) });
  }
}

/** Two blind answers to one message: `user.compare` = {left, right, verdict, closed}. Names appear with the verdict. */
class PairView {
  constructor(chat, user, actions) {
    Object.assign(this, { chat, user, actions });
    this.sides = ["left", "right"].map((side) => this.#column(side));
    const choice = (verdict, key) => h("button", { type: "button", class: "choice", "data-verdict": verdict, onclick: () => actions.verdict(user, verdict) }, t(key));
    this.choices = [choice("left", "compare.a_better"), choice("tie", "compare.tie"), choice("both_bad", "compare.both_bad"), choice("right", "compare.b_better")];
    this.skip = h("button", { type: "button", class: "text-button", onclick: () => actions.verdict(user, "skipped") }, t("compare.skip"));
    this.question = h("p", { class: "question", id: "q-" + user.id });
    this.ballot = h("div", { class: "ballot", role: "group", "aria-labelledby": "q-" + user.id }, this.question, h("div", { class: "choices" }, this.choices), this.skip);
    this.outcome = h("span");
    this.state = null; // the verdict is a vote on one of the two answers; its line is made when that is known
    this.result = h("div", { class: "result" }, this.outcome);
    this.element = h("section", { class: "turn pair", "data-node": user.id, "aria-label": t("compare") }, h("div", { class: "columns" }, this.sides.map((side) => side.element)), this.ballot, this.result);
  }

  #column(side) {
    const node = this.chat.nodes[this.user.compare[side]];
    const body = new AnswerBody(node, this.actions);
    const name = origin(node, this.actions);
    const badge = h("span", { class: "badge" }, t("compare.winner"));
    const go = h("button", { type: "button", class: "text-button continue", onclick: () => this.actions.proceed(this.user, node) }, t("compare.continue"));
    const head = h("header", {}, h("h2", {}, t(side === "left" ? "compare.a" : "compare.b")), badge);
    const foot = h("footer", {}, name.element, go);
    return { side, node, body, name, badge, go, foot, element: h("article", { class: "candidate", "data-side": side }, head, body.element, foot) };
  }

  update() {
    const { verdict } = this.user.compare;
    const complete = this.sides.every(({ node }) => node.status === "done" && node.response_id);
    const writing = this.sides.some(({ node }) => node.status === "streaming");
    for (const { side, node, body, name, badge, go, foot, element } of this.sides) {
      body.update();
      if (verdict) name.update(); // until then no name stands anywhere on the page
      badge.hidden = verdict !== side;
      element.classList.toggle("won", verdict === side);
      foot.hidden = !verdict;
      const active = this.chat.active[this.user.id] === node.id;
      go.textContent = t(active ? "compare.continuing" : "compare.continue");
      go.disabled = active;
      go.hidden = node.status === "error";
    }
    this.ballot.hidden = Boolean(verdict);
    const equal = complete && this.sides[0].node.text === this.sides[1].node.text;
    this.question.textContent = equal ? `${t("compare.equal")} ${t("compare.question")}` : t(complete ? "compare.question" : "compare.wait");
    for (const button of this.choices) button.disabled = !complete;
    this.skip.hidden = writing;
    this.result.hidden = !verdict;
    if (verdict) this.#updateResult(verdict);
  }

  #updateResult(verdict) {
    const voted = this.sides.find(({ node }) => node.feedback.latest === "choice" || node.feedback.undone);
    const undone = voted && !voted.node.feedback.choice;
    this.outcome.textContent = t("compare.voted." + (undone ? "undone" : verdict));
    if (voted && !this.state) {
      this.state = voteState(voted.node, this.actions);
      this.result.append(this.state.element);
    }
    this.state?.update();
    if (undone) this.state.element.hidden = true;
  }
}
