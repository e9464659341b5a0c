// The public HTTP API, relative to the page (so that it also works behind a path prefix).
import { recall } from "./storage.js";

/** `status` 0: the server was not reached. `code` and `message` are the server's own words where it gave some. */
export class ApiError extends Error {
  constructor(message, { status = 0, code = null, retryAfter = null } = {}) {
    super(message);
    Object.assign(this, { status, code, retryAfter });
  }
}

function headers(extra = {}) {
  const key = recall("key");
  return { "X-Prairie-Surface": "web", ...(key ? { Authorization: `Bearer ${key}` } : {}), ...extra };
}

async function call(path, options = {}) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options, headers: headers(options.headers) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(error.message);
  }
  if (!response.ok) throw await refusal(response);
  return response;
}

async function refusal(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    /* not our server's words: a proxy's page */
  }
  const said = body?.error ?? {};
  return new ApiError(said.message ?? `${response.status} ${response.statusText}`.trim(), {
    status: response.status,
    code: said.code ?? null,
    retryAfter: Number(response.headers.get("Retry-After")) || null,
  });
}

export async function listModels() {
  return (await (await call("v1/models")).json()).data ?? [];
}

export async function postFeedback(body, idempotencyKey) {
  const text = JSON.stringify(body);
  const response = await call("v1/feedback", {
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": idempotencyKey },
    body: text,
    keepalive: text.length < 16_000, // a vote given while the page is closing still leaves; browsers cap its size
  });
  return response.json();
}

export async function getFeedback(responseId) {
  return (await call(`v1/feedback/${encodeURIComponent(responseId)}`)).json();
}

/** Streams a chat completion; `onChunk` gets each chunk object. Raises ApiError if the stream says so or breaks off. */
export async function streamChat(body, { signal, onChunk }) {
  const response = await call("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  let done = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") {
        done = true;
        break;
      }
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message ?? "", { status: 500, code: chunk.error.code ?? null });
      onChunk(chunk);
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
    throw new ApiError("", { code: "broken" });
  }
  if (!done) throw new ApiError("", { code: "broken" });
}

/** The `data` of each server-sent event. The decoder holds back the bytes of a half character until the rest comes. */
export async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let waiting = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      waiting += done ? decoder.decode() : decoder.decode(value, { stream: true });
      const lines = waiting.split(/\r\n|\n|\r(?!$)/);
      waiting = done ? "" : lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        else if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
      if (done) {
        if (data.length) yield data.join("\n");
        return;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Go

const post = (path, body, options = {}) =>
  call(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), ...options });

export const goLines = async () => (await (await call("v1/go/lines")).json()).data;
export const goCurve = async (line) => (await call(`v1/go/lines/${encodeURIComponent(line)}`)).json();
export const askPosition = async (game) => (await post("v1/go/position", game)).json();

/** The champion's thoughts as they grow; the last one has the move to play. Raises ApiError if the stream breaks off. */
export async function think(question, signal, onThought) {
  const response = await post("v1/go/think", question, { signal });
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    onThought(JSON.parse(data));
  }
  throw new ApiError("", { code: "broken" });
}

// The studio

export const studio = async (what) => (await call(`v1/studio/${what}`)).json();
export const promote = async (line, version) =>
  (await post(`v1/studio/lines/${encodeURIComponent(line)}/promote`, { version })).json();
export const rollBack = async (line) => (await post(`v1/studio/lines/${encodeURIComponent(line)}/rollback`, {})).json();
