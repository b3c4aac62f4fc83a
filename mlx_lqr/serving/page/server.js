// Requests to the server that the page came from. Paths are relative, so that it may stand behind a prefix.

const KEY = "mlx-lqr-key";
const answering = { askForKey: null, asked: null };

/** What the server, or the way to it, refused, in one line. */
export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

/** Say how to ask for an API key: a function of a line, or null at first, that promises the key. */
export function askForKeyWith(ask) {
  answering.askForKey = ask;
}

/** The response to a request. Asks for a key where the server wants one, and goes on with it. */
export async function request(path, { method = "GET", body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const isFile = body instanceof Blob;
  if (body !== undefined) headers["Content-Type"] = isFile ? "application/octet-stream" : "application/json";
  const content = body === undefined || isFile ? body : JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, { method, headers, signal, body: content });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server does not answer. Is it still running?");
  }
  if (response.status === 401 && answering.askForKey) {
    if (sessionStorage.getItem(KEY) === key) await newKey(key);
    return request(path, { method, body, signal });
  }
  if (!response.ok) throw new ServerError(await refusal(response), response.status);
  return response;
}

/** Requests that are refused at the same time ask once. */
async function newKey(refused) {
  const line = refused ? "The server does not take this key." : null;
  answering.asked ??= answering.askForKey(line).finally(() => (answering.asked = null));
  sessionStorage.setItem(KEY, await answering.asked);
}

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const line = body?.error?.message ?? `The server answered with status ${response.status}.`;
  const wait = response.headers.get("Retry-After");
  return response.status === 503 && wait ? `${line} Try again in ${wait} s.` : line;
}

/** The objects of a stream of server-sent events, until [DONE]. */
export async function* events(path, body, signal) {
  const response = await request(path, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let unread = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ServerError("The server ended the answer early.");
      const lines = (unread + value).split(/\r?\n/);
      unread = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ServerError(event.error.message);
        yield event;
      }
    }
  } catch (error) {
    if (error instanceof ServerError || error.name === "AbortError") throw error;
    throw new ServerError("The connection to the server broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}
