// The windows of this browser that show the demo: each has a number, and tells the others where it is.

const TELL_MS = 150;
const FORGET_MS = 90_000; // a hidden window's timers may fire once a minute only
const SETTLE_MS = 200;

export class Windows {
  /** `changed` is called when another window has moved. */
  constructor(changed) {
    this.id = crypto.getRandomValues(new Uint32Array(1))[0];
    this.number = Number(sessionStorage.getItem("window")) || 0;
    this.since = Number(sessionStorage.getItem("since")) || Date.now();
    sessionStorage.setItem("since", this.since);
    this.others = new Map();
    this.place = {};
    this.changed = changed;
    this.channel = new BroadcastChannel("streamkeep-demo");
    this.channel.onmessage = ({ data }) => this.#hear(data);
    this.channel.postMessage({ kind: "hello", id: this.id });
    setTimeout(() => this.#settle(), this.number ? 0 : SETTLE_MS);
    addEventListener("pagehide", () => this.channel.postMessage({ kind: "bye", id: this.id }));
    setInterval(() => this.#tell(), 2000);
  }

  /** Tells the others what this window reads, and how far it is. */
  move(place) {
    this.place = place;
    this.telling ??= setTimeout(() => this.#tell(), TELL_MS);
  }

  /** Gives the other windows that read a stream. */
  readersOf(stream) {
    return [...this.others.values()].filter((other) => other.stream === stream).sort((a, b) => a.number - b.number);
  }

  #tell() {
    clearTimeout(this.telling);
    this.telling = undefined;
    if (this.number) this.channel.postMessage({ kind: "here", id: this.id, number: this.number, since: this.since, ...this.place });
    for (const [id, other] of this.others) {
      if (performance.now() - other.heardAt > FORGET_MS) this.others.delete(id);
    }
  }

  #hear(message) {
    if (message.kind === "bye") {
      this.others.delete(message.id);
    } else if (message.kind === "hello") {
      this.#tell();
    } else {
      this.others.set(message.id, { ...message, heardAt: performance.now() });
      if (message.number === this.number && this.#isYounger(message)) this.#settle();
    }
    this.changed();
  }

  #isYounger(other) {
    return (this.since - other.since || this.id - other.id) > 0;
  }

  // The smallest number that no other window has. Of two that have taken the same one, the younger takes another.
  #settle() {
    const taken = new Set([...this.others.values()].map((other) => other.number));
    if (!this.number || taken.has(this.number)) {
      this.number = 1;
      while (taken.has(this.number)) this.number += 1;
    }
    sessionStorage.setItem("window", this.number);
    this.#tell();
    this.changed();
  }
}
