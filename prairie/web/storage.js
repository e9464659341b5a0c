// What the page remembers in this browser: one localStorage key per thing, so that two tabs never overwrite each other's votes.
const PREFIX = "prairie.";
const listeners = { full: () => {} };

export function onStorageFull(listener) {
  listeners.full = listener;
}

export function recall(name, fallback = null) {
  try {
    const text = localStorage.getItem(PREFIX + name);
    return text === null ? fallback : JSON.parse(text);
  } catch {
    return fallback;
  }
}

/** True once the value is stored; a full or forbidden storage is told to the user, not thrown. */
export function remember(name, value) {
  try {
    localStorage.setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    listeners.full();
    return false;
  }
}

export function forget(name) {
  try {
    localStorage.removeItem(PREFIX + name);
  } catch {
    /* nothing is kept where nothing can be stored */
  }
}

/** Names (without the prefix) that start with `start`. */
export function names(start) {
  const found = [];
  try {
    for (let i = 0; i < localStorage.length; i++) {
      const key = localStorage.key(i);
      if (key.startsWith(PREFIX + start)) found.push(key.slice(PREFIX.length));
    }
  } catch {
    /* storage is forbidden: there are no names */
  }
  return found;
}

/** `crypto.randomUUID` exists only on https and localhost; the page must also work on a plain LAN address. */
export function uuid() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40;
  bytes[8] = (bytes[8] & 0x3f) | 0x80;
  const hex = [...bytes].map((byte) => byte.toString(16).padStart(2, "0")).join("");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}

/** A stable random pseudonym; no name, no address. */
export function pseudonym() {
  let user = recall("user");
  if (!user) {
    user = "web-" + uuid().replaceAll("-", "").slice(0, 16);
    remember("user", user);
  }
  return user;
}

// Conversations. `chats` is the index (id, title, updated); each conversation is a key of its own.
export const chatIndex = () => recall("chats", []).sort((a, b) => b.updated - a.updated);
export const loadChat = (id) => recall("chat." + id);

export function saveChat(chat) {
  remember("chat." + chat.id, chat);
  const index = recall("chats", []).filter((entry) => entry.id !== chat.id);
  index.push({ id: chat.id, title: chat.title, updated: chat.updated });
  remember("chats", index);
}

export function deleteChat(id) {
  forget("chat." + id);
  remember("chats", recall("chats", []).filter((entry) => entry.id !== id));
}
