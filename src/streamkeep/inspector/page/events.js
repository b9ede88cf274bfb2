// The events of a stream: a window of rows, one behind the other, that follows the newest ones, or is moved by scrolling.

import { ask, askText, streamPath, toClipboard } from "./api.js";
import { $, element, laidOut, number, size, span, textIn, visible, write } from "./words.js";

const WINDOW = 400;
const PAGE = 200;
const EDGE = 120; // pixels before an end at which more is loaded
const SILENCE = 1; // seconds that are worth a line of their own
const SHOWN_CHARACTERS = 200_000;
const RETRY_MS = 2000;
const CONTENT = /^\{"offset":\d+,"type":"\w+","\w+":/; // what of an event's line comes before its JSON

export class Events {
  constructor(say) {
    this.say = say;
    this.list = $("events");
    this.list.addEventListener("scroll", () => this.scrolled());
    this.list.addEventListener("toggle", (event) => this.toggled(event), true);
    this.list.addEventListener("keydown", (event) => this.move(event));
    $("text").addEventListener("scroll", () => this.leaveEnd($("text")));
    $("newest").addEventListener("click", () => this.follow(!this.isFollowing));
    $("go").addEventListener("change", () => $("go").value !== "" && this.goTo(Number($("go").value)));
    $("as-events").addEventListener("click", () => this.showAs("events"));
    $("as-text").addEventListener("click", () => this.showAs("text"));
  }

  // Shows a stream whose events so far are fewer than `tail`. Whoever is asked for the one before is not waited for.
  async open(id, life, tail) {
    this.id = id;
    this.life = life;
    this.tail = tail;
    this.isBusy = false;
    this.replaying = false;
    this.clear(tail);
    this.setFollowing(true);
    await this.openAt(tail);
  }

  clear(first) {
    this.came = null;
    this.rows = [];
    this.first = this.end = first;
    this.generation = (this.generation ?? 0) + 1;
    this.keepFocus(() => this.list.replaceChildren());
    this.textRows = [];
    $("text").replaceChildren();
  }

  // Waits for no window any more: the stream is left.
  leave() {
    this.came = null;
  }

  // Whoever is at a row that goes is at the list from then on, and not at the page's beginning.
  keepFocus(remove) {
    const wasHere = this.list.contains(document.activeElement);
    remove();
    if (wasHere && !this.list.contains(document.activeElement)) this.list.focus({ preventScroll: true });
  }

  openAt(tail) {
    this.tail = Math.max(this.tail, tail);
    return this.load(Math.max(0, tail - PAGE));
  }

  // Replaces the window by one that begins at an offset. What comes while it is asked for is kept, and appended then.
  async load(first, count = PAGE) {
    this.clear(first);
    const came = (this.came = []);
    let rows = null;
    while (rows === null) {
      rows = await this.fetch(first, count);
      if (came !== this.came) return; // another window has been asked for
      if (rows === null) await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
      if (came !== this.came) return;
    }
    this.came = null;
    this.append(rows);
    this.take(this.tail, came);
  }

  async fetch(first, count = PAGE) {
    const { generation } = this;
    this.isBusy = true;
    try {
      const answer = await ask(streamPath(this.id, "/events"), { from: first, limit: Math.min(count, WINDOW), life: this.life });
      return generation === this.generation ? answer.rows : null;
    } catch (error) {
      if (generation !== this.generation) return null;
      this.say(`Events could not be read: ${error.message}`);
      return error.code < 500 ? [] : null; // what is refused is not asked for again
    } finally {
      this.isBusy = false;
    }
  }

  // Takes what has come live: the newest rows, of which those before may be missing.
  take(tail, rows) {
    this.tail = Math.max(this.tail, tail);
    if (this.came) {
      if (rows.length && this.came.length && rows[0][0] !== this.came.at(-1)[0] + 1) this.came.splice(0); // of a burst the newest is told
      this.came.push(...rows);
      this.came.splice(0, this.came.length - WINDOW);
    } else if (this.isFollowing && !this.replaying) {
      if (rows.length && rows[0][0] > this.end) this.clear(rows[0][0]);
      this.append(rows.filter(([offset]) => offset >= this.end));
    }
    this.note();
  }

  // Asks for what has come since, where nobody tells of it.
  async catchUp(tail) {
    const rows = this.isFollowing && !this.replaying && !this.came && tail > this.end ? await this.fetch(Math.max(this.end, tail - PAGE)) : [];
    this.take(tail, rows ?? []);
  }

  append(rows) {
    if (rows.length === 0) return;
    const added = document.createDocumentFragment();
    for (const row of rows) {
      added.append(makeRow(row, this.rows.at(-1)));
      this.rows.push(row);
      this.addText(row);
    }
    this.end = rows.at(-1)[0] + 1;
    this.list.append(added);
    this.trimFirst(this.rows.length - WINDOW);
    if (this.isFollowing || this.replaying) this.toEnd();
  }

  prepend(rows) {
    const before = this.list.scrollHeight;
    const added = document.createDocumentFragment();
    rows.forEach((row, place) => added.append(makeRow(row, rows[place - 1])));
    this.rows.unshift(...rows);
    this.first = rows[0][0];
    this.list.prepend(added);
    this.list.scrollTop += this.list.scrollHeight - before;
    const extra = this.rows.length - 2 * WINDOW;
    if (extra > 0) {
      this.rows.splice(-extra);
      this.keepFocus(() => [...this.list.children].slice(-extra).forEach((item) => item.remove()));
      this.end = this.rows.at(-1)[0] + 1;
    }
    this.allText();
  }

  trimFirst(extra) {
    if (extra <= 0) return;
    const before = this.list.scrollHeight;
    const wasAt = this.list.scrollTop;
    this.rows.splice(0, extra);
    this.keepFocus(() => [...this.list.children].slice(0, extra).forEach((item) => item.remove()));
    this.first = this.rows[0][0];
    if (!this.isFollowing && !this.replaying) this.list.scrollTop = wasAt - (before - this.list.scrollHeight);
    this.trimText();
  }

  async scrolled() {
    if (this.replaying) return;
    this.leaveEnd(this.list);
    if (this.isBusy || this.rows.length === 0) return;
    const below = this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight;
    if (this.list.scrollTop < EDGE && this.first > 0) {
      const from = Math.max(0, this.first - PAGE);
      const rows = await this.fetch(from, this.first - from);
      if (rows?.length && rows.at(-1)[0] === this.first - 1) this.prepend(rows); // what is before the window may have gone meanwhile
    } else if (below < EDGE && this.end < this.tail && !this.isFollowing) {
      const rows = await this.fetch(this.end, PAGE);
      if (rows?.length) this.append(rows.filter(([offset]) => offset >= this.end));
    }
    this.note();
  }

  // Whoever scrolls up wants to read what is there.
  leaveEnd(box) {
    const isUp = box.scrollTop < (box.lastTop ?? 0) - 2;
    box.lastTop = box.scrollTop;
    const below = box.scrollHeight - box.scrollTop - box.clientHeight;
    if (isUp && below > EDGE / 3 && this.isFollowing && !this.replaying) this.setFollowing(false);
  }

  toEnd() {
    for (const box of [this.list, $("text")]) {
      box.scrollTop = box.scrollHeight;
      box.lastTop = box.scrollTop;
    }
  }

  follow(isWanted) {
    this.setFollowing(isWanted);
    if (isWanted && !this.replaying) {
      if (this.end < this.tail || this.rows.length === 0) this.openAt(this.tail);
      this.toEnd();
    }
  }

  setFollowing(isWanted) {
    this.isFollowing = isWanted;
    $("newest").setAttribute("aria-pressed", String(isWanted));
    this.note();
  }

  async goTo(offset) {
    if (!Number.isInteger(offset) || offset < 0) return;
    this.setFollowing(false);
    const wanted = Math.min(offset, Math.max(0, this.tail - 1));
    if (wanted < this.first || wanted >= this.end) await this.load(Math.max(0, wanted - PAGE / 2));
    const item = this.list.children[wanted - this.first];
    if (!item) return;
    for (const marked of this.list.querySelectorAll(".found")) marked.classList.remove("found");
    item.classList.add("found");
    item.scrollIntoView({ block: "center" });
    item.querySelector("summary").focus({ preventScroll: true });
  }

  note() {
    if (this.rows.length === 0) return write($("log-note"), this.tail ? "" : "Nothing has been written yet.");
    const newer = this.tail - this.end;
    const range = `${number(this.first)} to ${number(this.end - 1)} of ${number(this.tail)}`;
    const more = !this.isFollowing && !this.replaying && newer > 0 ? `${number(newer)} newer` : "";
    write($("log-note"), more ? `${range} · ${more}` : range);
  }

  move(event) {
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!step || event.target === this.list) return;
    const item = event.target.closest("li");
    const to = step > 0 ? item?.nextElementSibling : item?.previousElementSibling;
    to?.querySelector("summary").focus();
    event.preventDefault();
  }

  // One event, in full

  async toggled(event) {
    const details = event.target;
    if (!details.open || details.querySelector("pre")) return;
    const offset = Number(details.dataset.offset);
    const shown = element("pre", { tabindex: "0" }, "…");
    details.append(shown);
    try {
      const line = await askText(streamPath(this.id, `/events/${offset}`), { life: this.life });
      const whole = line.slice(line.match(CONTENT)[0].length, -1);
      const { internal, ...told } = details.parentElement.dataset.type === "error" ? JSON.parse(whole) : {};
      const text = laidOut(internal ? JSON.stringify(told) : whole, SHOWN_CHARACTERS);
      write(shown, visible(internal ? `${text}\n\nNot shown to readers:\n${internal}` : text));
      const copy = element("button", { type: "button", class: "small" }, "Copy");
      copy.addEventListener("click", () => this.copy(whole, `event ${offset}`));
      details.append(copy);
    } catch (error) {
      write(shown, `This event could not be read: ${error.message}`);
    }
  }

  async copy(text, what) {
    try {
      await toClipboard(text);
      this.say(`Copied ${what}`);
    } catch (error) {
      this.say(`Could not copy: ${error.message}`);
    }
  }

  // As text

  showAs(what) {
    $("as-events").setAttribute("aria-pressed", String(what === "events"));
    $("as-text").setAttribute("aria-pressed", String(what === "text"));
    this.list.hidden = what !== "events";
    $("text").hidden = what !== "text";
    if (this.isFollowing) this.toEnd();
  }

  addText(row) {
    const text = textIn(row);
    if (text === null) return;
    const piece = document.createElement("span");
    piece.textContent = visible(text);
    this.textRows.push([row[0], piece]);
    $("text").append(piece);
  }

  trimText() {
    while (this.textRows.length && this.textRows[0][0] < this.first) this.textRows.shift()[1].remove();
  }

  allText() {
    this.textRows = [];
    $("text").replaceChildren();
    for (const row of this.rows) this.addText(row);
  }
}

function makeRow(row, before) {
  const [offset, type, preview, bytes, at] = row;
  const known = at !== null && before && before[4] !== null;
  const wait = known ? at - before[4] : null;
  const summary = element(
    "summary",
    {},
    element("span", { class: "offset" }, number(offset)),
    element("span", { class: wait >= SILENCE ? "wait long" : "wait" }, wait === null ? "" : `+${span(wait)}`),
    element("span", { class: "type" }, type),
    element("span", { class: "preview" }, visible(preview) + (bytes > 320 ? "…" : "")),
    element("span", { class: "size" }, size(bytes)),
  );
  const details = element("details", { "data-offset": String(offset) }, summary);
  return element("li", { "data-type": type }, details);
}
