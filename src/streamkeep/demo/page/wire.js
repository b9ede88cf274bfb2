// The same stream as the client of another dialect reads it: the newest lines of the response, but for ids.

const LINES = 3;
const KEPT_CHARACTERS = 20_000;
const RETRY_MS = 2000;

export class Wire {
  constructor(stream, dialect, changed) {
    this.stream = stream;
    this.dialect = dialect;
    this.changed = changed;
    this.text = "";
    this.leaving = new AbortController();
    this.#run();
  }

  get lines() {
    return this.text.split("\n").filter((line) => line.trim() && !line.startsWith("id:")).slice(-LINES);
  }

  leave() {
    this.leaving.abort();
  }

  async #run() {
    const { signal } = this.leaving;
    const url = `/answer/${encodeURIComponent(this.stream)}/as/${this.dialect}`;
    while (!signal.aborted) {
      try {
        const response = await fetch(url, { signal, cache: "no-store" });
        if (response.status < 500) return await this.#read(response.body);
      } catch {
        // cut, or the server is away
      }
      await new Promise((resolve) => setTimeout(resolve, RETRY_MS));
    }
  }

  async #read(body) {
    this.text = "";
    if (!body) return;
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    for (let read = await reader.read(); !read.done; read = await reader.read()) {
      this.text = (this.text + read.value).slice(-KEPT_CHARACTERS);
      this.changed();
    }
  }
}
