// Reads flows with Genkit's official client, many at a time. A line on stdin is [number, job], a line on stdout [number, outcome].
//
//   {"url", "input"?, "streamId"?, "headers"?}             one call of streamFlow, whatever becomes of it
//   {"url", "input"?, "streamId"?, "silenceMs", "tries"}   as often as it takes
//   {"stream", "chunks", "output" or "error"}
import { createInterface } from "node:readline";

import { reconnecting, streamFlow } from "./reconnecting.mjs";

async function* once({ onStreamId, ...request }) {
  const answer = streamFlow(request);
  answer.output.catch(() => {}); // the iteration raises the same error
  answer.streamId.then(onStreamId);
  yield* answer.stream;
  return await answer.output;
}

async function read(number, job) {
  const outcome = { stream: null, chunks: [] };
  const onStreamId = (id) => (outcome.stream = id);
  const stream = (job.tries ? reconnecting : once)({ ...job, onStreamId });
  try {
    let next;
    while (!(next = await stream.next()).done) outcome.chunks.push(next.value);
    outcome.output = next.value;
  } catch (error) {
    outcome.error = `${error.name}: ${error.message}`;
  }
  process.stdout.write(JSON.stringify([number, outcome]) + "\n");
}

const reading = [];
for await (const line of createInterface({ input: process.stdin })) reading.push(read(...JSON.parse(line)));
await Promise.all(reading);
process.exit(0); // connections that are kept for later would keep it running
