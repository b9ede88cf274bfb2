// A reader of one stream over native server-sent events. Its position is one number, the offset of the last event it has;
// it checks that each event has the next one.

const QUIET_MS = 3000;
const RETRY_MS = 2000;

/** Gives what the server knows of a stream: {found, status, error, tail, isWritten}; null if the server does not answer. */
export async function infoOf(stream) {
  try {
    const response = await fetch(`/streams/${encodeURIComponent(stream)}/info`, { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (response.status === 404) return { found: false };
    if (!response.ok) return null;
    const info = await response.json();
    return { found: true, status: info.status, error: info.error, tail: info.tail, isWritten: info.isWritten };
  } catch {
    return null;
  }
}

export class Reader {
  /** `kept` is what `keepsake` gave before a reload; `changed` is called after every change, `log` with what is worth saying. */
  constructor(stream, kept, { changed, log }) {
    this.stream = stream;
    this.state = "connecting"; // live, cut, away, done, error, gone
    this.chunks = kept?.chunks ?? [];
    this.offset = kept?.offset ?? -1;
    this.received = kept?.received ?? 0;
    this.missing = kept?.missing ?? 0;
    this.doubled = kept?.doubled ?? 0;
    this.late = kept?.late ?? []; // [from, to): offsets that had been missed, and came at once
    this.end = kept?.end ?? null; // {output} or {status, message}
    this.stored = this.offset + 1; // how many events the server is known to hold
    this.info = null;
    this.lastEventAt = performance.now();
    this.changed = changed;
    this.log = log;
  }

  keepsake() {
    const { chunks, offset, received, missing, doubled, late, end } = this;
    return { chunks, offset, received, missing, doubled, late, end };
  }

  get ended() {
    return this.end !== null || this.state === "gone";
  }

  get quiet() {
    return this.state === "live" && performance.now() - this.lastEventAt > QUIET_MS;
  }

  connect() {
    this.#close();
    this.#enter("connecting");
    const after = this.offset >= 0 ? `?after=${this.offset}` : "";
    const source = new EventSource(`/streams/${encodeURIComponent(this.stream)}${after}`);
    this.source = source;
    source.onopen = () => this.#opened();
    source.addEventListener("chunk", (event) => this.#take(event, (data) => this.chunks.push(data)));
    source.addEventListener("done", (event) => this.#take(event, (data) => this.#finish("done", { output: data })));
    source.addEventListener("error", (event) => this.#failed(event));
  }

  cut() {
    this.#close();
    this.#enter("cut");
    this.log(`Cut the connection at offset ${this.offset}`);
  }

  /** Asks how far the server is, without reading. */
  async look() {
    this.info = await infoOf(this.stream);
    if (this.info?.found) this.stored = Math.max(this.stored, this.info.tail);
    this.changed();
  }

  #close() {
    clearTimeout(this.retry);
    this.source?.close();
    this.source = null;
  }

  #enter(state) {
    this.state = state;
    this.changed();
  }

  async #opened() {
    const wasAway = this.state === "away";
    const opened = { from: this.offset, at: performance.now(), wasAway, stored: null, took: 0 };
    this.opened = opened;
    this.lastEventAt = opened.at - (wasAway ? QUIET_MS - 1000 : 0); // after an outage it is worth asking soon
    if (!this.ended) this.#enter("live");
    await this.look();
    if (this.opened !== opened || !this.info?.found) return;
    opened.stored = this.info.tail;
    this.#noteCaughtUp();
  }

  // An event of the stream has the next offset at the end of its id. All else is counted, and shown: it would be a bug.
  #take(event, use) {
    const offset = offsetOf(event.lastEventId);
    this.received += 1;
    this.lastEventAt = performance.now();
    if (offset <= this.offset) {
      this.doubled += 1;
    } else {
      this.missing += offset - this.offset - 1;
      this.offset = offset;
      this.stored = Math.max(this.stored, offset + 1);
      use(JSON.parse(event.data));
    }
    this.#noteCaughtUp();
    this.changed();
  }

  #noteCaughtUp() {
    const opened = this.opened;
    if (!opened || opened.from === this.offset) {
      if (opened?.stored === this.offset + 1) this.#sayConnected(opened, 0);
      return;
    }
    opened.took ||= performance.now() - opened.at;
    if (opened.stored !== null && this.offset >= opened.stored - 1) this.#sayConnected(opened, opened.stored - 1 - opened.from);
  }

  #sayConnected({ from, took, wasAway }, missed) {
    this.opened = null;
    const again = wasAway ? "Connected again" : "Connected";
    const where = from < 0 ? `${again}, from the start` : `${again} after offset ${from}`;
    if (missed <= 0) return this.log(from < 0 ? where : `${where}; nothing was missed`);
    if (from >= 0) this.late.push([from + 1, from + 1 + missed]);
    const what = from < 0 ? (missed === 1 ? "1 stored event" : `${missed} stored events`) : missed === 1 ? "the one missed event" : `the ${missed} missed events`;
    this.log(`${where}; got ${what} at once, in ${Math.max(1, Math.round(took))}\u00a0ms`);
    this.changed();
  }

  #failed(event) {
    if (event.data !== undefined && event.lastEventId !== "" && offsetOf(event.lastEventId) > this.offset) {
      this.#take(event, (error) => this.#finish("error", error));
    } else if (event.data !== undefined) {
      this.log(`The server says: ${JSON.parse(event.data).message}`); // of this response, not of the stream
    } else if (this.source?.readyState === EventSource.CLOSED) {
      this.#askWhy();
    } else if (this.state !== "away") {
      this.log(`Lost the connection at offset ${this.offset}; trying again`);
      this.#enter("away");
    }
  }

  #finish(state, end) {
    this.end = end;
    this.#close();
    this.#enter(state);
    this.log(state === "done" ? `Complete, at offset ${this.offset}` : `Ended with ${end.status}, at offset ${this.offset}`);
  }

  // The browser gives up when it gets no stream of events: nothing is left (204), nothing is there (404), or a proxy has answered.
  async #askWhy() {
    await this.look();
    const info = this.info;
    if (this.state === "cut") return;
    if (info?.found === false || (info && info.tail <= this.offset)) {
      this.#enter("gone");
      this.log("The server has no such stream");
    } else if (info && info.status !== "open" && info.tail === this.offset + 1) {
      this.#restoreEnd(info);
    } else {
      this.#enter("away");
      this.retry = setTimeout(() => this.connect(), RETRY_MS);
    }
  }

  #restoreEnd(info) {
    this.end ??= info.status === "done" ? {} : { status: info.error, message: "" };
    this.#enter(info.status);
    this.log(`Nothing is left after offset ${this.offset}: the stream has ended`);
  }
}

/** Gives the offset in an event's id, which is a cursor: the stream, which life of its name, and the offset. */
export function offsetOf(cursor) {
  return Number(cursor.slice(cursor.lastIndexOf("/") + 1));
}
