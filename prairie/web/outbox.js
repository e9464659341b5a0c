// Votes on their way to the server. A vote is stored here before anything is sent and leaves only when the server has
// acknowledged it, so a restart of the server, of the page or of the machine loses none. The Idempotency-Key makes a
// vote that is sent twice count once. One localStorage key per vote: two tabs cannot overwrite each other.
import { ApiError, postFeedback } from "./api.js";
import { forget, names, pseudonym, recall, remember, uuid } from "./storage.js";

const SETTLE_MS = 600; // a click that changes its mind (reason chips) becomes one vote
const LONGEST_WAIT_MS = 60_000;

/**
 * Events: `change` (detail: {item, state: "saving"|"saved"|"waiting"|"refused", event, message}), `key` (401: a key is wanted).
 * An item: {key, body, place: {chat, node, slot}, created, attempts, retract}.
 */
export class Outbox extends EventTarget {
  #sending = null;
  #again = false;
  #timer = null;
  #memory = new Map(); // votes that the browser's storage would not take
  #failures = 0;

  constructor() {
    super();
    addEventListener("online", () => this.flush());
    addEventListener("pagehide", () => this.flush());
    document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && this.flush());
  }

  items() {
    const stored = names("outbox.").map((name) => recall(name)).filter(Boolean);
    return [...stored, ...this.#memory.values()].sort((a, b) => a.created - b.created || a.order - b.order);
  }

  get waiting() {
    return this.items().length;
  }

  #keep(item) {
    if (remember("outbox." + item.key, item)) this.#memory.delete(item.key);
    else this.#memory.set(item.key, item);
  }

  #drop(item) {
    forget("outbox." + item.key);
    this.#memory.delete(item.key);
  }

  #read(key) {
    return this.#memory.get(key) ?? recall("outbox." + key);
  }

  /** Stores the vote and returns its item. A vote of the same place that was never sent takes the new value. */
  add(body, place) {
    const now = Date.now();
    const same = this.items().find(
      (item) => !item.attempts && !item.retract && item.body.kind === body.kind && place && item.place?.node === place.node && item.place?.slot === place.slot,
    );
    const item = same ?? { key: uuid(), created: now, order: performance.now(), attempts: 0, retract: false };
    Object.assign(item, { body: { ...body, user: pseudonym() }, place, not_before: now + (body.kind === "thumb" ? SETTLE_MS : 0) });
    this.#keep(item);
    this.#tell(item, "saving");
    this.#schedule(Math.max(0, item.not_before - now));
    return item;
  }

  /**
   * Sends a vote again under its own key, when another tab has overwritten what came back: the server answers with the
   * event that it has. `retract`: and takes it back then.
   */
  resend({ key, body }, place, { retract = false } = {}) {
    if (!body || this.#read(key)) return;
    const now = Date.now();
    this.#keep({ key, body, place, created: now, order: performance.now(), attempts: 1, retract, not_before: now });
    this.#schedule(0);
  }

  /** Takes a vote back: one that was never sent is dropped, any other is followed by a `retract` event. */
  retract({ key, event, body }) {
    const item = this.#read(key);
    if (item && !item.attempts) this.#drop(item);
    else if (item) this.#keep({ ...item, retract: true });
    else if (event != null) this.add({ response_id: body.response_id, kind: "retract", value: { event } }, null);
    else this.resend({ key, body }, null, { retract: true });
    this.#schedule(0);
  }

  /** Tries every vote once, oldest first. Safe to call at any time, from any tab. */
  flush() {
    if (this.#sending) this.#again = true;
    else this.#sending = this.#sendAll().finally(() => this.#rest());
    return this.#sending;
  }

  async #sendAll() {
    clearTimeout(this.#timer);
    this.#timer = null;
    for (const { key } of this.items()) {
      const item = this.#read(key); // it may have changed, or left through another tab
      if (!item) continue;
      const early = item.not_before - Date.now();
      if (early > 0 && document.visibilityState !== "hidden") {
        this.#schedule(early);
        continue;
      }
      item.attempts += 1;
      this.#keep(item);
      try {
        const { id } = await postFeedback(item.body, item.key);
        this.#failures = 0;
        this.#acknowledged(key, id);
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        if (!this.#canRetry(error)) {
          this.#drop(item);
          this.#tell(item, "refused", { message: error.message });
          continue;
        }
        this.#tell(item, "waiting", { message: error.message });
        if (error.status === 401) this.dispatchEvent(new CustomEvent("key"));
        this.#failures += 1;
        const wait = Math.min(LONGEST_WAIT_MS, 1000 * 2 ** Math.min(this.#failures - 1, 6));
        this.#schedule(error.retryAfter ? error.retryAfter * 1000 : wait * (0.75 + Math.random() / 2));
        return;
      }
    }
  }

  #rest() {
    this.#sending = null;
    if (this.#again) this.#schedule(0);
    this.#again = false;
  }

  #acknowledged(key, event) {
    const item = this.#read(key);
    if (!item) return;
    this.#drop(item);
    this.#tell(item, "saved", { event });
    if (item.retract) this.add({ response_id: item.body.response_id, kind: "retract", value: { event } }, null);
  }

  /** Only a clear "no" of our own server ends a vote's life; what a proxy, a restart or a full disk says does not. */
  #canRetry(error) {
    if (error.status === 0 || error.status >= 500 || [401, 403, 408, 425, 429].includes(error.status)) return true;
    return error.code === null || error.code === "busy";
  }

  #schedule(ms) {
    if (this.#timer !== null) clearTimeout(this.#timer);
    this.#timer = setTimeout(() => this.flush(), ms);
  }

  #tell(item, state, more = {}) {
    this.dispatchEvent(new CustomEvent("change", { detail: { item, state, ...more } }));
  }
}
