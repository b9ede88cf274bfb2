// Node's: reads with the npm package `eventsource`. A line on stdin is [number, job], one on stdout [number, event], null at the end.
import { createInterface } from "node:readline";

import { EventSource } from "eventsource";

import { byEventSource } from "./readers.js";

const read = byEventSource(EventSource);
const say = (number, event) => process.stdout.write(JSON.stringify([number, event]) + "\n");

for await (const line of createInterface({ input: process.stdin })) {
  const [number, job] = JSON.parse(line);
  read(job, (event) => say(number, event)).then(() => say(number, null));
}
process.exit(0);
