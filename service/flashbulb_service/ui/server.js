// The server as the page sees it: requests with the tab's key, errors as title and detail, and event streams that
// go on behind the last event when their connection breaks.

const KEY = "flashbulb-key"; // in the session's storage: gone with the tab
const RETRIES = 5;

export const hasKey = () => sessionStorage.getItem(KEY) !== null;
export const keepKey = (key) => sessionStorage.setItem(KEY, key);
export const dropKey = () => sessionStorage.removeItem(KEY);

export class Refusal extends Error {
  constructor(title, detail, status) {
    super(title);
    this.detail = detail;
    this.status = status;
  }
}

// `path` is relative to the page: a proxy may have put both under a path of its own.
export function ask(path, options = {}) {
  const key = sessionStorage.getItem(KEY);
  return fetch(path, key ? { ...options, headers: { ...options.headers, authorization: `Bearer ${key}` } } : options);
}

// The answer's JSON, or a Refusal that says what the server said.
export async function askJson(path, options = {}) {
  const response = await ask(path, options);
  if (!response.ok) throw await refusalOf(response);
  return response.json();
}

export function post(path, body, signal) {
  const headers = { "content-type": "application/json" };
  return askJson(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export async function refusalOf(response) {
  const id = response.headers.get("x-request-id") ?? "";
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    error = {}; // an answer from something in between
  }
  const parts = [`${response.status} ${error.code ?? ""}`.trim(), error.param && `field ${error.param}`, id];
  const title = error.message ?? `The server answered ${response.status}.`;
  return new Refusal(title, parts.filter(Boolean).join(" · "), response.status);
}

// A file of the server as a data: address, which the page may show and the visitor may save.
export async function fileAsData(path) {
  const response = await ask(path);
  if (!response.ok) throw await refusalOf(response);
  const blob = await response.blob();
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

// Yield {name, data} of a stream until it ends as `isLast` says; a broken connection is taken up again.
export async function* events(path, isLast, signal) {
  let last = null;
  for (let attempt = 0; ; attempt++) {
    try {
      const response = await ask(path, { headers: last ? { "last-event-id": last } : {}, signal });
      if (!response.ok) throw await refusalOf(response);
      for await (const event of readEvents(response.body)) {
        if (event.id) last = event.id;
        attempt = 0;
        yield event;
        if (isLast(event)) return;
      }
    } catch (error) {
      if (error.name === "AbortError" || error instanceof Refusal || attempt >= RETRIES) throw error;
    }
    if (attempt >= RETRIES) throw new TypeError("the stream of events ended early");
    await new Promise((resolve) => setTimeout(resolve, 200 * 2 ** attempt));
  }
}

async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += value.replaceAll("\r\n", "\n");
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const event = parseEvent(text.slice(0, end));
        text = text.slice(end + 2);
        if (event) yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(block) {
  const fields = { event: "message", id: "", data: [] };
  for (const line of block.split("\n")) {
    const [, name, value] = /^(event|id|data): ?(.*)$/.exec(line) ?? [];
    if (name === "data") fields.data.push(value);
    else if (name) fields[name] = value;
  }
  return fields.data.length ? { name: fields.event, id: fields.id, data: JSON.parse(fields.data.join("\n")) } : null;
}
