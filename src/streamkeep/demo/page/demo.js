// The page: shows a reader, the other windows, and what the server says; and lets you do things to them.

import { infoOf, Reader } from "./reader.js";
import { SlowReader } from "./slow.js";
import { Windows } from "./windows.js";
import { Wire } from "./wire.js";

const RENDER_MS = 40;
const SAVE_MS = 1000;
const LOOK_MS = 1000;
const LOG_ENTRIES = 60;

const $ = (id) => document.getElementById(id);
const count = new Intl.NumberFormat("en");

let reader = null;
let slow = null;
let wire = null;
let server = null;
let log = [];
let shown = 0; // how many chunks the page shows
let problem = null;
let rendering;

const windows = new Windows(schedule);

// What happens

async function ask(question) {
  const leave = new AbortController();
  try {
    const response = await fetch("/answer", {
      method: "POST",
      headers: { "Accept": "text/event-stream", "Content-Type": "application/json" },
      body: JSON.stringify({ data: question }),
      signal: leave.signal,
    });
    const stream = response.headers.get("X-Genkit-Stream-Id");
    if (!response.ok || !stream) throw new Error((await response.json()).error?.message ?? response.statusText);
    history.pushState(null, "", `?stream=${stream}`);
    show(stream, null, []);
    say("Asked; the server gave the stream an id, and works on whether or not anybody reads");
  } catch (error) {
    problem = error instanceof TypeError
      ? { headline: "The server does not answer.", detail: "Is it running?" }
      : { headline: "The server refused.", detail: error.message };
    schedule();
  } finally {
    leave.abort(); // the answer outlives the request that asked for it
  }
}

function show(stream, kept, entries) {
  leave();
  log = entries;
  problem = null;
  shown = 0;
  $("text").replaceChildren();
  reader = new Reader(stream, kept, { changed: schedule, log: say });
  if (kept) say(`The page was reloaded; it had kept ${events(reader.offset + 1)}`);
  reader.connect();
  showWire();
}

function leave() {
  reader?.cut();
  slow?.leave();
  wire?.leave();
  reader = slow = wire = null;
}

function showWire() {
  wire?.leave();
  const dialect = $("dialect").value;
  wire = reader && dialect ? new Wire(reader.stream, dialect, schedule) : null;
  schedule();
}

async function stop() {
  const response = await fetch(`/streams/${reader.stream}/cancel`, { method: "POST" }).catch(() => null);
  if (!response?.ok) say("Could not stop it: the server does not answer");
  else say((await response.json()).stopped ? "Asked the server to stop" : "It had ended already");
}

function toggleSlow() {
  if (slow) {
    slow.leave();
    slow = null;
  } else {
    slow = new SlowReader(reader.stream, schedule);
  }
  schedule();
}

function say(sentence) {
  log = [{ at: Date.now(), sentence }, ...log].slice(0, LOG_ENTRIES);
  schedule();
}

async function meetServer() {
  const before = server;
  try {
    server = await (await fetch("/server", { cache: "no-store" })).json();
  } catch {
    return;
  }
  if (before && before.pid !== server.pid) say(`The server is back, as another process (${before.pid} is now ${server.pid})`);
  schedule();
}

// What is kept for a reload: in this window, so that a second one starts from the first word.

function save() {
  if (!reader) return;
  sessionStorage.setItem("reading", JSON.stringify({ stream: reader.stream, kept: reader.keepsake(), log }));
}

function restore() {
  const stream = new URLSearchParams(location.search).get("stream");
  if (!stream) {
    leave();
    schedule();
    return;
  }
  const saved = JSON.parse(sessionStorage.getItem("reading") ?? "null");
  if (saved?.stream === stream) show(stream, saved.kept, saved.log);
  else show(stream, null, []);
}

// What the page says

function headline() {
  if (problem) return { tone: "bad", ...problem };
  if (!reader) return { tone: "calm", headline: "Nothing has been asked yet.", detail: `The whole answer takes ${server ? `about ${server.seconds} s` : "a while"}.` };
  const place = events(reader.offset + 1);
  switch (reader.state) {
    case "connecting":
      return { tone: "calm", headline: "Connecting.", detail: `${place} so far.` };
    case "live":
      return reader.quiet ? silence() : { tone: "live", headline: "The answer is coming.", detail: `${place} so far.` };
    case "cut":
      return { tone: "warn", headline: "You have cut the connection.", detail: whileCut() };
    case "away":
      return { tone: "warn", headline: "The server is away; trying again.", detail: `The ${place} received so far stay.` };
    case "done":
      return { tone: "good", headline: "Complete.", detail: `${place}, the last at offset ${reader.offset}.` };
    case "gone":
      return { tone: "bad", headline: "The server has no such stream.", detail: "It never had, or the stream has expired: this demo keeps them for an hour. Ask again." };
    default:
      return failure(reader.end, `Here is what had been stored: ${place}, the last at offset ${reader.offset}.`);
  }
}

function failure({ status, message }, stored) {
  if (status === "CANCELLED") return { tone: "warn", headline: "Stopped.", detail: stored };
  if (status === "ABORTED" && message?.includes("shut down")) return { tone: "bad", headline: "The server was shut down in mid-answer.", detail: stored };
  if (status === "ABORTED") return { tone: "bad", headline: "The server was killed in mid-answer.", detail: stored };
  return { tone: "bad", headline: `The answer failed: ${message || status}.`, detail: stored };
}

function whileCut() {
  if (reader.info === null) return "The server does not answer, either.";
  if (reader.info.found === false) return "The stream has expired meanwhile.";
  const missed = reader.stored - 1 - reader.offset;
  const ended = reader.info.status === "open" ? "The answer goes on without you" : "The answer has ended without you";
  return missed > 0 ? `${ended}: ${events(missed)} to catch up on.` : `${ended}.`;
}

function silence() {
  const headline = "Connected, but nothing comes.";
  const detail = reader.info?.isWritten === false ? "Nobody writes it: another process may go on, or it is given up." : "If its server is gone, the answer is given up in a quarter of a minute.";
  return { tone: "warn", headline, detail };
}

function events(number) {
  return number === 1 ? "1 event" : `${count.format(number)} events`;
}

const PLACES = { sqlite: "Streams are kept in an SQLite file", memory: "Streams are kept in the server’s memory, and go with it" };
const WORDS = { connecting: "connecting", live: "live", cut: "cut off", away: "trying again", done: "complete", error: "ended", gone: "lost", ended: "ended" };

function readers() {
  if (!reader) return [];
  const stored = Math.max(reader.stored, (slow?.offset ?? -1) + 1, ...windows.readersOf(reader.stream).map((other) => other.offset + 1));
  const status = reader.info?.found && reader.info.status !== "open" ? "ended" : "";
  const rows = [
    { name: "Stored by the server", at: stored, words: [events(stored), status], of: stored, kind: "stored" },
    { name: `This window (${windows.number || "…"})`, ...row(reader, stored), kind: "own" },
  ];
  for (const other of windows.readersOf(reader.stream)) rows.push({ name: `Window ${other.number}`, ...row(other, stored), kind: "other" });
  if (slow) rows.push({ name: "The slow reader", ...row(slow, stored), kind: "slow" });
  return rows;
}

function row({ offset, state }, stored) {
  return { at: offset + 1, of: stored, words: [offset < 0 ? "no offset yet" : `offset ${count.format(offset)}`, WORDS[state]] };
}

function verdict() {
  if (!reader || reader.received === 0) return "Every event has an offset; each must be one more than the last.";
  if (reader.missing || reader.doubled) return "That must not happen. Please report it.";
  const output = reader.end?.output;
  if (typeof output !== "string") return "Nothing lost, nothing twice.";
  const text = reader.chunks.join("");
  return text === output.trim() ? `Nothing lost, nothing twice: all ${count.format(output.length)} characters are as the server has them.` : "The text differs from the server’s. Please report it.";
}

// Showing it

function schedule() {
  rendering ??= setTimeout(render, RENDER_MS);
}

function render() {
  rendering = undefined;
  renderText();
  renderState();
  renderReaders();
  renderWire();
  renderControls();
  renderLog();
  windows.move(reader ? { stream: reader.stream, offset: reader.offset, state: reader.state } : {});
  document.title = reader && reader.offset >= 0 ? `${reader.offset} · streamkeep` : "streamkeep";
}

function renderText() {
  $("invitation").hidden = reader !== null;
  $("text").hidden = reader === null;
  $("text").dataset.state = reader?.state ?? "";
  if (!reader) {
    $("text").replaceChildren();
    return;
  }
  const answer = $("answer");
  const follows = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 60;
  const fresh = reader.chunks.slice(shown).map(spanOf);
  $("text").append(...fresh);
  shown += fresh.length;
  for (const [from, to] of reader.late) {
    for (let offset = from; offset < to; offset += 1) $("text").children[offset]?.classList.add("late");
  }
  if (fresh.length && follows) answer.scrollTop = answer.scrollHeight;
}

function spanOf(chunk) {
  const span = document.createElement("span");
  span.textContent = chunk;
  return span;
}

function renderState() {
  const { tone, headline: words, detail = "" } = headline();
  $("state").dataset.tone = tone;
  setText($("headline"), words);
  setText($("detail"), detail);
  setText($("received"), count.format(reader?.received ?? 0));
  setText($("missing"), count.format(reader?.missing ?? 0));
  setText($("doubled"), count.format(reader?.doubled ?? 0));
  setText($("verdict"), verdict());
  if (server) {
    setText($("server"), `${PLACES[server.storage] ?? "The streams are kept by the server"}, ${server.tokensPerSecond} tokens a second.`);
    for (const code of document.querySelectorAll("[data-kill]")) setText(code, `kill -9 ${server.pid}`);
  }
}

function renderReaders() {
  const rows = readers();
  const list = $("readers");
  while (list.children.length > rows.length) list.lastElementChild.remove();
  while (list.children.length < rows.length) list.append(readerRow());
  rows.forEach(({ name, at, of, words, kind }, index) => {
    const item = list.children[index];
    item.className = kind;
    setText(item.querySelector(".name"), name);
    setText(item.querySelector(".words"), words.filter(Boolean).join(" · "));
    const bar = item.querySelector("progress");
    bar.max = Math.max(of, 1);
    bar.value = at;
    bar.setAttribute("aria-label", name);
  });
}

function renderWire() {
  $("wire").hidden = !wire;
  if (!wire) return;
  setText($("wire"), wire.lines.join("\n") || "…");
  $("wire").scrollTop = $("wire").scrollHeight; // long lines take several
}

function readerRow() {
  const item = document.createElement("li");
  for (const [tag, name] of [["span", "name"], ["span", "words"], ["progress", "bar"]]) {
    const part = document.createElement(tag);
    part.className = name;
    item.append(part);
  }
  return item;
}

function renderControls() {
  const reading = reader !== null && !reader.ended;
  $("cut").disabled = !reading;
  setText($("cut"), reader?.state === "cut" ? "Reconnect" : "Cut the connection");
  $("reload").disabled = reader === null;
  $("stop").disabled = !reading;
  $("slow").disabled = reader === null || reader.state === "gone";
  setText($("slow"), slow ? "Remove the slow reader" : "Add a slow reader");
  const second = $("second");
  second.setAttribute("aria-disabled", String(reader === null));
  if (reader) second.href = `?${new URLSearchParams({ stream: reader.stream, as: $("dialect").value })}`;
  else second.removeAttribute("href");
  $("slow-text").hidden = !slow;
  if (slow) setText($("slow-text"), lastWordsOf(slow.text));
}

function renderLog() {
  const list = $("log");
  const known = Number(list.dataset.newest ?? 0);
  const newest = log[0] ? log[0].at + log.length / 1000 : 0;
  if (newest === known) return;
  list.dataset.newest = newest;
  list.replaceChildren(...log.map(({ at, sentence }) => {
    const item = document.createElement("li");
    const time = document.createElement("time");
    time.dateTime = new Date(at).toISOString();
    time.textContent = new Date(at).toLocaleTimeString("en-GB");
    item.append(time, ` ${sentence}`);
    return item;
  }));
}

// A few of its last words, the first one whole.
function lastWordsOf(text) {
  return text.length > 150 ? `… ${text.slice(text.indexOf(" ", text.length - 150) + 1)}` : text || "…";
}

function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

// Beginning

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask($("question").value.trim());
});
$("cut").addEventListener("click", () => (reader.state === "cut" ? reader.connect() : reader.cut()));
$("reload").addEventListener("click", () => location.reload());
$("stop").addEventListener("click", stop);
$("slow").addEventListener("click", toggleSlow);
$("dialect").addEventListener("change", () => {
  sessionStorage.setItem("dialect", $("dialect").value);
  showWire();
});
addEventListener("pagehide", save);
addEventListener("popstate", restore);
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
setInterval(save, SAVE_MS);
setInterval(async () => {
  if (reader?.state === "cut" || reader?.quiet) await reader.look();
  if (reader?.state === "live" || reader?.state === "away") await meetServer();
  schedule();
}, LOOK_MS);

$("dialect").value = sessionStorage.getItem("dialect") ?? new URLSearchParams(location.search).get("as") ?? "";
meetServer();
restore();
