// Node's: reads whole answers of UI messages as the clients of `ai` do. A line on stdin is [number, { body }], one on stdout [number, event]:
// each part that its own schema takes (`part`) or refuses (`refused`), the message that becomes of them, what is wrong with it, and null.
import { createInterface } from "node:readline";

import { parseJsonEventStream, readUIMessageStream, uiMessageChunkSchema } from "ai";

const say = (number, event, data) =>
  process.stdout.write(JSON.stringify([number, event && { event, data: JSON.stringify(data), id: "" }]) + "\n");
const streamOf = (value) => new Blob([value]).stream();

const read = async (number, { body }) => {
  const parts = [];
  for await (const part of parseJsonEventStream({ stream: streamOf(body), schema: uiMessageChunkSchema })) {
    if (part.success) parts.push(part.value);
    say(number, part.success ? "part" : "refused", part.success ? part.value : part.rawValue ?? String(part.error));
  }
  let message = null;
  const onError = (error) => say(number, "error", String(error.message));
  for await (const next of readUIMessageStream({ stream: ReadableStream.from(parts), onError })) message = next;
  say(number, "message", message);
  say(number, null);
};

for await (const line of createInterface({ input: process.stdin })) await read(...JSON.parse(line));
process.exit(0);
