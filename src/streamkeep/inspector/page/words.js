// How values read. Whatever others wrote (chunks, ids, owners) is shown as text, and nothing in it is obeyed or hidden.

const whole = new Intl.NumberFormat("en");
// But for tabs, ends of lines, and what says that a symbol is to have colours.
const SECRETLY_ACTIVE = /(?![\t\n]|(?<=\p{Extended_Pictographic})\ufe0f)[\p{Cc}\p{Cf}\p{Cs}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu;

export const $ = (id) => document.getElementById(id);

export const number = (value) => whole.format(value);

// Gives text without what turns its direction, has no width, or is a control character: that becomes an escape sequence.
export const visible = (text) => text.replace(SECRETLY_ACTIVE, (character) => escaped(character.codePointAt(0).toString(16)));

const escaped = (hex) => (hex.length > 4 ? `\\u{${hex}}` : `\\u${hex.padStart(4, "0")}`);

// Lays the beginning of JSON out in lines. Numbers stay as they are written: they may have more digits than numbers hold here.
export function laidOut(json, characters) {
  let text = "";
  let depth = 0;
  let before = "";
  for (const [token] of json.slice(0, characters).matchAll(/"[^"\\]*(?:\\.[^"\\]*)*"?|[[\]{}:,]|[^\s"[\]{}:,]+/gs)) {
    const isEnd = token === "]" || token === "}";
    if (isEnd) depth--;
    const isEmpty = isEnd && (before === "[" || before === "{");
    if ((isEnd && !isEmpty) || (!isEnd && ["[", "{", ","].includes(before))) text += `\n${"  ".repeat(depth)}`;
    text += token[0] === '"' ? unescaped(token) : token === ":" ? ": " : token;
    if (token === "[" || token === "{") depth++;
    before = token;
    if (text.length > characters) break;
  }
  return text.length > characters || json.length > characters ? `${text.slice(0, characters)}\n…` : text;
}

function unescaped(token) {
  try {
    return JSON.stringify(JSON.parse(token));
  } catch {
    return token; // its end is not here
  }
}

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
