// A reader that takes few events a second, by reading no further: the connection fills up, the writer and the other readers go on.

import { offsetOf } from "./reader.js";

const EVENTS_PER_SECOND = 12;
const RETRY_MS = 2000;

export class SlowReader {
  constructor(stream, changed) {
    this.stream = stream;
    this.changed = changed;
    this.offset = -1;
    this.text = "";
    this.state = "live";
    this.leaving = new AbortController();
    this.#run();
  }

  leave() {
    this.leaving.abort();
  }

  async #run() {
    while (this.state === "live") {
      try {
        await this.#read();
      } catch {
        if (this.leaving.signal.aborted) return;
      }
      await sleep(RETRY_MS);
    }
  }

  async #read() {
    const after = this.offset >= 0 ? `?after=${this.offset}` : "";
    const response = await fetch(`/streams/${encodeURIComponent(this.stream)}${after}`, { signal: this.leaving.signal });
    if (response.status !== 200) {
      if (response.status < 500) this.#end();
      return;
    }
    for await (const { id, event, data } of eventsOf(response.body)) {
      if (id === undefined) continue;
      this.offset = offsetOf(id);
      if (event === "chunk") this.text += JSON.parse(data);
      else this.#end();
      this.changed();
      await sleep(1000 / EVENTS_PER_SECOND);
      this.leaving.signal.throwIfAborted();
    }
  }

  #end() {
    this.state = "ended";
    this.changed();
  }
}

/** Gives the events of a response's body, each as its fields. */
async function* eventsOf(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const blocks = (rest + value).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) yield Object.fromEntries(block.split("\n").map(fieldOf));
  }
}

function fieldOf(line) {
  const colon = line.indexOf(": ");
  return [line.slice(0, colon), line.slice(colon + 2)];
}

function sleep(milliseconds) {
  return new Promise((resolve) => setTimeout(resolve, milliseconds));
}
