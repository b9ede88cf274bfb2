// One stream: what is known of it, who is at it, what comes, and what may be done to it.

import { Refused, ask, live, streamPath, toClipboard, withConnection } from "./api.js";
import { draw } from "./charts.js";
import { Events } from "./events.js";
import { Replay } from "./replay.js";
import { Timing } from "./timing.js";
import { $, ago, clock, element, events as eventsIn, number, size, span, visible, write } from "./words.js";

const DRAW_MS = 250;
const LOOK_MS = 5000;
const GLANCE_MS = 2000;
const LATE_SECONDS = 4;
const PAUSES_MS = [100, 400, 1600, 6400]; // between two messages on events; longer where the connection is slow
const RETRY_MS = [500, 1000, 2000, 5000];
const COPIED_CHARACTERS = 16_000_000;
const SILENCES = 5;
const PREPARE_MS = 1000;
const ALIVE = 0.6; // a writer that lives is silent for about half of the time after which it counts as dead

export class Stream {
  constructor({ say, confirm, gone }) {
    this.say = say;
    this.confirm = confirm;
    this.gone = gone;
    this.events = new Events(say);
    this.replay = new Replay(this.events, say);
    this.leaving = new AbortController();
    $("copy").addEventListener("click", () => this.copy());
    $("stop").addEventListener("click", () => this.stop());
    $("delete").addEventListener("click", () => this.delete());
    setInterval(() => this.draw(), DRAW_MS);
  }

  open(id) {
    this.close();
    this.id = id;
    this.known = null;
    this.problem = null;
    this.bytes = 0;
    this.openedAt = performance.now() / 1000;
    this.preparedAt = -PREPARE_MS;
    this.isOver = false;
    this.pace = 0;
    this.timing = new Timing();
    this.replay.clear();
    this.events.clear(0);
    this.events.tail = 0;
    write($("title"), visible(id));
    $("facts").replaceChildren();
    this.silencesShown = null;
    $("stream").hidden = false;
    $("nothing").hidden = true;
    this.draw();
    this.follow(this.leaving.signal);
  }

  close() {
    this.leaving.abort();
    this.leaving = new AbortController();
    this.events.leave();
    this.id = null;
    $("stream").hidden = true;
    $("nothing").hidden = false;
  }

  async follow(signal) {
    const { id } = this;
    for (let tries = 0; !signal.aborted && !this.isOver; tries++) {
      let isEnded = false;
      let isRefused = false;
      try {
        const query = () => ({ life: this.life, pause: PAUSES_MS[this.pace] });
        const isFollowed = await withConnection(() => live(id, query(), signal, (message) => {
          if (signal.aborted) return true;
          if (message.kind !== "begin" && message.kind !== "end") tries = 0;
          isEnded = message.kind === "end" && (message.why === null || message.why === "gone");
          this.hear(message);
          return !isEnded && this.isLate(message);
        }));
        if (!isFollowed && !signal.aborted) isEnded = await this.glance(signal);
      } catch (error) {
        if (signal.aborted) return;
        this.fail(error);
        isRefused = error instanceof Refused && error.code !== 429 && error.code < 500;
      }
      this.draw();
      if (isEnded || isRefused) await this.look(signal, isRefused);
      else await pause(RETRY_MS[Math.min(tries, RETRY_MS.length - 1)], signal);
    }
  }

  // A stream that has ended is looked at now and then: it expires, or is deleted. One that was refused is followed once it is not.
  async look(signal, wasRefused) {
    while (!signal.aborted && !this.isOver) {
      try {
        this.know(await ask(streamPath(this.id), { life: this.life }, { signal }));
        if (wasRefused) return;
      } catch (error) {
        if (signal.aborted) return;
        this.fail(error);
      }
      this.draw();
      await pause(LOOK_MS, signal);
    }
  }

  // Looks at a stream that cannot be followed, because other pages have all connections that there are for that; says whether it has ended.
  async glance(signal) {
    const known = await ask(streamPath(this.id), { life: this.life }, { signal });
    if (signal.aborted) return false;
    const { status, tail } = known.stream;
    const isNew = this.isNew(known.stream);
    this.know(known);
    if (isNew) await this.events.open(this.id, known.stream.life, tail);
    else await this.events.catchUp(tail);
    if (signal.aborted || status !== "open") return status !== "open";
    this.problem = { words: "other pages here follow streams already, as many as can: this one looks every two seconds, and times nothing" };
    this.draw();
    await pause(GLANCE_MS, signal);
    return false;
  }

  get life() {
    return this.known?.stream.life ?? null;
  }

  fail(error) {
    this.problem = { code: error.code, words: error instanceof Refused ? error.message : `${error.message}; trying again` };
    if (error.code === 404) this.isOver = true;
  }

  isNew({ life }) {
    return this.events.id !== this.id || this.events.life !== life || (this.events.rows.length === 0 && !this.replay.schedule);
  }

  // A slow connection has much on its way, all of it old: it is left then, and the next one is told less. What counts is how much later
  // a message comes than the quickest one did, so that clocks need not agree.
  isLate({ now }) {
    if (now === undefined) return false;
    const offset = performance.now() / 1000 - now;
    this.quickest = Math.min(this.quickest ?? offset, offset);
    if (offset - this.quickest < LATE_SECONDS) return false;
    this.quickest = null; // or it is a clock that was set
    this.pace = Math.min(this.pace + 1, PAUSES_MS.length - 1);
    return true;
  }

  hear(message) {
    switch (message.kind) {
      case "begin":
        this.know(message);
        return this.begin(message.first);
      case "state":
        return this.know(message);
      case "events":
        this.timing.add(message.runs);
        this.bytes += message.bytes;
        this.events.take(message.tail, message.rows);
        if (this.known) this.written(message);
        return;
      case "end":
        if (message.why === "gone") this.isOver = true;
        else if (message.why && message.why !== "closed") this.problem = { words: message.why };
    }
  }

  // How it stands is told every two seconds; that something came is known earlier.
  written({ tail, runs }) {
    const { stream } = this.known;
    stream.tail = Math.max(stream.tail, tail);
    if (runs.length) stream.updated_at = Math.max(stream.updated_at, runs.at(-1)[2] - runs.at(-1)[3]);
  }

  know(known) {
    this.known = known;
    this.problem = null;
    this.skew = known.now - performance.now() / 1000;
  }

  async begin(first) {
    const { id, leaving } = this;
    const { life } = this.known.stream;
    if (this.isNew(this.known.stream)) this.events.open(id, life, first);
    else if (first > this.events.end && this.events.isFollowing && !this.replay.schedule) this.events.openAt(first);
    else this.events.take(first, []);
    try {
      const { runs } = await ask(streamPath(id, "/timing"), { life });
      if (leaving.signal.aborted) return;
      this.timing = Timing.of(runs, this.timing.runs);
    } catch {
      // what comes from now on is seen all the same
    }
  }

  get now() {
    return performance.now() / 1000 + this.skew;
  }

  draw() {
    if (this.id === null || this.id === undefined) return;
    this.drawStanding();
    if (!this.known) return;
    const { stream, read_only } = this.known;
    const isLive = stream.status === "open" && !this.isOver;
    $("stop").hidden = read_only;
    $("stop").disabled = !isLive;
    $("delete").hidden = read_only;
    $("delete").disabled = this.isOver;
    this.drawFacts();
    draw(this.timing, this.now, isLive);
    if (performance.now() - this.preparedAt < PREPARE_MS) return;
    this.preparedAt = performance.now();
    this.drawSilences();
    this.replay.prepare(stream, this.timing);
  }

  drawStanding() {
    const { tone, state, why } = this.standing();
    $("stream").dataset.tone = tone;
    write($("state"), state);
    write($("why"), why);
    const title = this.known ? `${visible(this.id)} · ${state}` : visible(this.id);
    if (document.title !== title) document.title = title;
  }

  standing() {
    if (this.isOver) return { tone: "gone", state: "gone", why: "It was deleted, or has expired. What is shown is what was seen." };
    if (this.problem && !this.known) {
      $("stop").disabled = true;
      return { tone: "error", state: this.problem.code ? "cannot be read" : "away", why: sentence(this.problem.words) };
    }
    if (!this.known) return { tone: "calm", state: "looking", why: "" };
    const { stream } = this.known;
    const away = this.problem ? sentence(this.problem.words) : "";
    if (stream.status === "open") return { tone: "open", state: stream.is_recovering ? "recovering" : "open", why: away || this.writer() };
    const left = stream.expires_at - this.now;
    const expires = left > 0 ? `Expires in ${span(left)}.` : "Expires now.";
    return { tone: stream.status, state: stream.error ? stream.error.toLowerCase().replaceAll("_", " ") : stream.status, why: away || expires };
  }

  writer() {
    const { writer } = this.known;
    if (writer.where === "none") return "Nobody writes it; it was released.";
    if (writer.where === "here") return "Its writer is in this process.";
    if (writer.silent === null) return "Its writer’s process has ended.";
    if (writer.silent > ALIVE * writer.dead_after) return `Its writer has been silent for ${span(writer.silent)}, and counts as dead after ${span(writer.dead_after)}.`;
    const lookedFor = performance.now() / 1000 - this.openedAt;
    const isSeen = this.bytes > 0 || lookedFor > ALIVE * writer.dead_after;
    return isSeen ? "Its writer is alive, in another process." : "Its writer is in another process; in a few seconds it is known whether that lives.";
  }

  drawFacts() {
    const { stream, readers } = this.known;
    const facts = [
      ["events", number(Math.max(stream.tail, this.events.tail))],
      ["came while this was open", this.bytes ? size(this.bytes) : "nothing"],
      ["opened", `${clock(stream.created_at)} · ${ago(this.now - stream.created_at)}`],
      ["last written", `${clock(stream.updated_at)} · ${ago(this.now - stream.updated_at)}`],
      ["owner", stream.owner || "nobody"],
      ["key", stream.key || "none"],
      ["readers, this process only", `${number(readers.app)} · ${readers.pages === 1 ? "1 page" : `${number(readers.pages)} pages`} like this`],
    ];
    if (stream.session) facts.push(["writer’s session", `${stream.session.slice(0, 12)}…`, "name"]);
    if (stream.attempt) facts.push(["writers that died", number(stream.attempt)]);
    if (stream.superseded) facts.push(["superseded before", number(stream.superseded)]);
    for (const [name, value] of Object.entries(stream.metadata)) facts.push([name, value, "given"]);
    const list = $("facts");
    while (list.children.length > facts.length) list.lastElementChild.remove();
    facts.forEach(([name, value, kind = "known"], place) => {
      if (!list.children[place]) list.append(element("div", {}, element("dt"), element("dd")));
      const [term, description] = list.children[place].children;
      list.children[place].dataset.kind = kind;
      write(term, visible(name));
      write(description, visible(value));
    });
  }

  drawSilences() {
    const silences = this.timing.silences(1, SILENCES);
    const key = JSON.stringify(silences);
    if (key === this.silencesShown) return;
    this.silencesShown = key;
    $("gaps").replaceChildren(...silences.map(({ offset, seconds }) => {
      const go = element("button", { type: "button", class: "link" }, `before ${number(offset)}`);
      go.addEventListener("click", () => this.replay.schedule || this.events.goTo(offset));
      return element("li", {}, element("b", {}, span(seconds)), " ", go);
    }));
    write($("no-gaps"), silences.length ? "" : this.timing.isEmpty ? "Only what comes while this page is open is timed." : "None of a second or more.");
  }

  // What may be done

  async copy() {
    const { id, events } = this;
    const lines = [];
    let characters = 0;
    let next = 0;
    let tail = 0;
    try {
      const { stream } = await ask(streamPath(id), { life: events.life ?? null });
      tail = stream.tail;
      while (next < tail && characters < COPIED_CHARACTERS) {
        const got = await ask(streamPath(id, "/copy"), { from: next, life: stream.life });
        if (got.lines.length === 0) break;
        for (const line of got.lines) {
          lines.push(line);
          characters += line.length;
        }
        next = got.next;
      }
      await toClipboard(`{"stream":${JSON.stringify(stream)},"events":[\n${lines.join(",\n")}\n]}\n`);
      const rest = tail - lines.length;
      this.say(rest > 0 ? `Copied the first ${eventsIn(lines.length)}; ${number(rest)} more did not fit. streamkeep tail --json prints all.` : `Copied ${eventsIn(lines.length)}`);
    } catch (error) {
      this.say(`Could not copy: ${error.message}`);
    }
  }

  async stop() {
    const { id } = this;
    const { life } = this;
    if (!(await this.confirm("Stop this stream?", `${id} ends with the error CANCELLED, and its producer is told.`, "Stop it"))) return;
    try {
      const { stopped } = await ask(streamPath(id, "/stop"), { life }, { method: "POST" });
      this.say(stopped ? "Stopped" : "It had ended already");
    } catch (error) {
      this.say(`Could not stop it: ${error.message}`);
    }
  }

  async delete() {
    const { id } = this;
    const { life } = this;
    if (!(await this.confirm("Delete this stream?", `${id} and all its events are forgotten at once, for everybody.`, "Delete it"))) return;
    try {
      await ask(streamPath(id), { life }, { method: "DELETE" });
      this.say("Deleted");
      if (this.id === id) this.gone();
    } catch (error) {
      this.say(`Could not delete it: ${error.message}`);
    }
  }
}

const sentence = (words) => `${words[0].toUpperCase()}${words.slice(1)}${words.endsWith(".") ? "" : "."}`;

function pause(milliseconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
  });
}
