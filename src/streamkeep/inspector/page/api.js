// What the server is asked. A token that came in the page's address is sent as a header, and kept for this window only.

const LIVE_SILENCE_MS = 20_000; // the server says something every two seconds

export class Refused extends Error {
  constructor(code, message) {
    super(message);
    this.code = code;
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
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new Refused(response.status, body?.error?.message || `the server answers ${response.status}`);
}

export async function ask(path, query = {}, options = {}) {
  return (await request(path, query, options)).json();
}

export async function askText(path, query) {
  return (await request(path, query, {})).text();
}

export const streamPath = (id, rest = "") => `/${encodeURIComponent(id)}${rest}`;

// Calls `tell` with what is said of a stream, and returns when that has ended; throws when it is cut, refused or silent.
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
      for (const part of parts) tell(JSON.parse(part.slice("data: ".length)));
    }
  } finally {
    clearTimeout(timer);
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
