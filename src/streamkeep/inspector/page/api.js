// What the server is asked. A token that came in the page's address is sent as a header, and kept for this window only.

const LIVE_SILENCE_MS = 20_000; // the server says something every two seconds
const ASK_MS = 60_000;
const SLOTS = 4;

// What is thrown is one of these two: the server has answered something else, or has not answered.
export class Refused extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
  }
}

export class Away extends Error {
  constructor() {
    super("the server does not answer");
  }
}

export function takeToken() {
  const named = new URLSearchParams(location.hash.slice(1));
  const token = named.get("token");
  if (token === null) return;
  sessionStorage.setItem("token", token);
  named.delete("token");
  history.replaceState(null, "", `#${named}`); // it is not to stay in the history
}

export const hasToken = () => sessionStorage.getItem("token") !== null;

function headers() {
  const token = sessionStorage.getItem("token");
  return { "X-Streamkeep-Inspector": "1", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

async function request(path, query, options) {
  const given = Object.entries(query).filter(([, value]) => value !== null && value !== "");
  const search = new URLSearchParams(given).toString();
  const url = new URL(`api/streams${path}${search ? `?${search}` : ""}`, location.href);
  url.username = url.password = ""; // as in a link that has them; nothing may be fetched from such an address
  const response = await fetch(url, { headers: headers(), cache: "no-store", ...options });
  const isOurs = /^(application\/json|text\/event-stream)/.test(response.headers.get("content-type") ?? "");
  if (response.ok && isOurs) return response;
  const body = isOurs ? await response.json().catch(() => null) : null;
  if (response.ok) throw new Refused(502, "something else than the inspector answers; perhaps you have to log in again");
  throw new Refused(response.status, body?.error?.message || `the server answers ${response.status}`);
}

// A connection may be dead without a word; and an error of the browser's own, such as a time-out, has a `code` of another kind.
async function answered(path, query, { signal, ...options }, read) {
  try {
    const limit = AbortSignal.timeout(ASK_MS);
    return await read(await request(path, query, { ...options, signal: signal ? AbortSignal.any([signal, limit]) : limit }));
  } catch (error) {
    throw error instanceof Refused ? error : new Away();
  }
}

export const ask = (path, query = {}, options = {}) => answered(path, query, options, (response) => response.json());

export const askText = (path, query) => answered(path, query, {}, (response) => response.text());

export const streamPath = (id, rest = "") => `/${encodeURIComponent(id)}${rest}`;

// By HTTP/1.1 a browser has six connections to a server, for all its pages. Those that follow leave some of them to others: this says
// whether it could be run. (Without HTTPS there are no locks, but on the machine itself.)
export async function withConnection(run) {
  const isShared = /^h[23]/.test(performance.getEntriesByType("navigation")[0]?.nextHopProtocol ?? "");
  if (isShared || !navigator.locks) return run().then(() => true);
  for (let slot = 0; slot < SLOTS; slot++) {
    const name = `streamkeep-inspector-${slot}`;
    if (await navigator.locks.request(name, { ifAvailable: true }, (lock) => lock !== null && run().then(() => true))) return true;
  }
  return false;
}

// Calls `tell` with what is said of a stream, and returns when that has ended, or when `tell` gives true, for that it has had enough;
// throws when it is cut, refused or silent.
export async function live(id, query, signal, tell) {
  const silence = new AbortController();
  let timer = setTimeout(() => silence.abort(), LIVE_SILENCE_MS);
  try {
    const response = await request(streamPath(id, "/live"), query, { signal: AbortSignal.any([signal, silence.signal]) });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), LIVE_SILENCE_MS);
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) if (tell(JSON.parse(part.slice("data: ".length)))) return;
    }
  } catch (error) {
    throw error instanceof Refused ? error : new Away();
  } finally {
    clearTimeout(timer);
    silence.abort(); // what is still on its way
  }
}

export async function toClipboard(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const area = document.createElement("textarea"); // without HTTPS there is no other way
  area.value = text;
  document.body.append(area);
  area.select();
  const copied = document.execCommand("copy");
  area.remove();
  if (!copied) throw new Error("the browser does not let pages copy here");
}
