// How values read. Whatever others wrote (chunks, ids, owners) is shown as text, and nothing in it is obeyed or hidden.

const whole = new Intl.NumberFormat("en");
const SECRETLY_ACTIVE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

export const $ = (id) => document.getElementById(id);

export const number = (value) => whole.format(value);

// Gives text without what turns its direction, has no width, or is a control character: that becomes an escape sequence.
export const visible = (text) => text.replace(SECRETLY_ACTIVE, (character) => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`);

export function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) if (value !== null) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

// Writes text where it differs: what is not written is not read out again, nor laid out.
export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export const events = (count) => (count === 1 ? "1 event" : `${number(count)} events`);

export function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  return bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

export function span(seconds) {
  const size = Math.abs(seconds);
  if (size < 0.0995) return `${Math.round(seconds * 1000)} ms`;
  if (size < 9.95) return `${seconds.toFixed(1)} s`;
  if (size < 120) return `${Math.round(seconds)} s`;
  if (size < 7200) return `${Math.round(seconds / 60)} min`;
  return size < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
}

export function ago(seconds) {
  if (seconds < 1) return "now";
  return `${seconds < 120 ? `${Math.round(seconds)} s` : span(seconds)} ago`;
}

export function timer(seconds) {
  const minutes = Math.floor(seconds / 60);
  return `${minutes}:${(seconds - 60 * minutes).toFixed(1).padStart(4, "0")}`;
}

export function clock(epoch) {
  const date = new Date(epoch * 1000);
  const time = date.toLocaleTimeString("en-GB");
  return date.toDateString() === new Date().toDateString() ? time : `${date.toLocaleDateString("en-CA")} ${time}`;
}

// The text in an event, if it is one of the shapes in which models stream text.
export function textIn([, type, preview, bytes]) {
  if (type !== "chunk" || bytes > 300) return null;
  try {
    return textOf(JSON.parse(preview));
  } catch {
    return null;
  }
}

function textOf(value) {
  if (typeof value === "string") return value;
  if (value === null || typeof value !== "object") return null;
  if (Array.isArray(value)) return value.map(textOf).filter((text) => text !== null).join("") || null;
  for (const name of ["text", "delta", "content", "message", "choices", "parts", "output", "data"]) {
    const text = textOf(value[name] ?? null);
    if (text !== null) return text;
  }
  return null;
}
