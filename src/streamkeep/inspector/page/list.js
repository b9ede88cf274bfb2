// The list of streams: one page of it, asked for again and again, at a bounded rate.

import { ask } from "./api.js";
import { $, ago, element, number, visible, write } from "./words.js";

const LIMIT = 50;
const POLL_MS = 2000;
const REST = 10; // how many times as long as an answer took nothing is asked
const EMPTY_PAGES = 200;

export class List {
  constructor(changed) {
    this.changed = changed; // called with the filter, when that was changed here
    this.cursors = [""];
    this.rows = new Map();
    this.seen = new Map();
    this.streams = [];
    this.turn = 0;
    for (const name of ["id", "owner", "key"]) $(name).addEventListener("input", () => this.filterSoon());
    $("status").addEventListener("change", () => this.filterSoon(0));
    $("next").addEventListener("click", () => this.go(this.next));
    $("previous").addEventListener("click", () => this.goBack());
    $("list").addEventListener("keydown", (event) => this.move(event));
    document.addEventListener("visibilitychange", () => document.hidden || this.poll());
  }

  get filter() {
    return { id: $("id").value.trim(), status: $("status").value, owner: $("owner").value, key: $("key").value };
  }

  start(filter) {
    for (const name of ["id", "status", "owner", "key"]) $(name).value = filter[name] ?? "";
    this.poll();
  }

  filterSoon(milliseconds = 250) {
    clearTimeout(this.typing);
    this.typing = setTimeout(() => {
      this.cursors = [""];
      this.changed(this.filter);
      this.poll();
    }, milliseconds);
  }

  go(cursor) {
    this.cursors.push(cursor);
    this.poll();
    $("list").scrollTop = 0;
  }

  goBack() {
    this.cursors.pop();
    this.poll();
  }

  async poll() {
    const turn = ++this.turn; // whoever polls later is asked about what is wanted then
    clearTimeout(this.waiting);
    const begin = performance.now();
    try {
      const found = await this.look(turn);
      if (turn !== this.turn) return;
      this.show(found);
    } catch (error) {
      if (turn !== this.turn) return;
      this.fail(error);
    }
    const pause = Math.max(POLL_MS, REST * (performance.now() - begin));
    if (!document.hidden) this.waiting = setTimeout(() => this.poll(), pause);
  }

  // What is asked for may be rare: the server looks for half a second, and is asked on until a page is full.
  async look(turn) {
    const streams = [];
    let after = this.cursors.at(-1);
    for (let pages = 0; ; pages++) {
      const answer = await ask("", { ...this.filter, after, limit: LIMIT - streams.length });
      streams.push(...answer.streams);
      after = answer.next;
      if (turn !== this.turn) return null;
      if (after === null || streams.length >= LIMIT || pages >= EMPTY_PAGES) return { ...answer, streams };
      write($("list-state"), `Looking on; ${number(streams.length)} found so far.`);
    }
  }

  show({ streams, next, now, read_only }) {
    this.streams = streams;
    this.next = next;
    $("mode").hidden = !read_only;
    setDisabled($("next"), next === null, $("previous"));
    setDisabled($("previous"), this.cursors.length === 1, $("next"));
    const number_ = this.cursors.length;
    write($("page-number"), number_ === 1 && next === null ? "" : `Page ${number_}`);
    write($("list-state"), this.words(streams.length, next));
    const before = this.rows;
    this.rows = new Map();
    for (const stream of streams) {
      const name = `${stream.id} ${stream.life}`;
      const row = before.get(name) ?? makeRow(stream);
      updateRow(row, stream, this.rate(name, stream, now), now);
      this.rows.set(name, row);
    }
    const rows = [...this.rows.values()].map(({ item }) => item);
    const shown = $("list").children;
    if (rows.length !== shown.length || rows.some((row, place) => shown[place] !== row)) {
      const focused = document.activeElement;
      const place = [...shown].findIndex((row) => row.contains(focused));
      $("list").replaceChildren(...rows);
      const next = focused?.isConnected ? focused : rows[Math.min(place, rows.length - 1)]?.querySelector("a"); // the row may be gone
      if (place >= 0) (next ?? $("id")).focus({ preventScroll: true });
    }
    this.mark();
  }

  words(count, next) {
    const { id, status, owner, key } = this.filter;
    if (count > 0) return "";
    if (next !== null) return "None of those that were looked at is like this; Next looks on.";
    if (this.cursors.length > 1) return "No streams on this page any more.";
    return id || status || owner || key ? "No stream is like this." : "There are no streams.";
  }

  rate(name, { tail, status }, now) {
    const last = this.seen.get(name);
    this.seen.set(name, { tail, now });
    if (this.seen.size > 1000) this.seen.delete(this.seen.keys().next().value);
    return last && status === "open" && now > last.now ? (tail - last.tail) / (now - last.now) : 0;
  }

  fail(error) {
    if (error.code === 401 || error.code === 403) write($("list-state"), `You are not let in: ${error.message}.`);
    else if (error.code) write($("list-state"), `The streams cannot be listed: ${error.message}.`);
    else write($("list-state"), "The server does not answer; trying again.");
  }

  select(id) {
    this.selected = id;
    this.mark();
  }

  mark() {
    for (const { link, id } of this.rows.values()) {
      if (id === this.selected) link.setAttribute("aria-current", "true");
      else link.removeAttribute("aria-current");
    }
  }

  move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step) return;
    const links = [...$("list").querySelectorAll("a")];
    const to = links[links.indexOf(document.activeElement) + step];
    if (to) to.focus();
    event.preventDefault();
  }
}

// Whoever is at a button that can be pressed no more is at the other one then.
function setDisabled(button, isDisabled, other) {
  const wasHere = document.activeElement === button;
  button.disabled = isDisabled;
  if (!wasHere || !isDisabled) return;
  other.disabled = false;
  other.focus();
}

function makeRow({ id }) {
  const state = element("span", { class: "status" });
  const about = element("span", { class: "about" });
  const count = element("span", { class: "count" });
  const name = element("span", { class: "id" }, visible(id));
  const link = element("a", { href: `#${new URLSearchParams({ stream: id })}` }, name, state, about, count);
  return { item: element("li", {}, link), link, state, about, count, id };
}

function updateRow(row, stream, rate, now) {
  const status = stream.error ?? (stream.is_recovering ? "recovering" : stream.status);
  write(row.state, status.toLowerCase().replaceAll("_", " "));
  row.link.dataset.status = stream.status;
  write(row.about, [stream.owner, stream.key].filter(Boolean).map(visible).join(" · ") || "no owner");
  const pace = rate > 0 ? `${rate < 10 ? rate.toFixed(1) : number(Math.round(rate))}/s` : ago(now - stream.updated_at);
  write(row.count, `${number(stream.tail)} · ${pace}`);
}
