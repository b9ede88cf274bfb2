// Drives Genkit's official client for tests: one JSON command as the argument, JSON lines as they happen on stdout.
//
//   {"op": "stream", "url", "input"?, "init"?, "headers"?, "streamId"?, "abortAfter"?, "timeoutMs"?}
//       {"streamId": …}, {"chunk": …} for each, then {"output": …} or {"error": "message"}
//       abortAfter: abort after so many chunks; 0 means as soon as the answer's headers are there
//   {"op": "run", "url", "input"?, "init"?, "headers"?, "timeoutMs"?}
//       {"output": …} or {"error": "message"}
//
// Ends by itself, after timeoutMs with {"hang": true} and exit code 3. Only where the client spins in microtasks, as it does when
// a body ends without a terminal frame, no timer ever fires, and the caller must kill this process.
import { writeSync } from "node:fs";

import { runFlow, streamFlow } from "genkit/beta/client";

const { op, abortAfter, timeoutMs = 10000, ...request } = JSON.parse(process.argv[2]);

// Not process.stdout: that queues what a full pipe does not take, and exiting would lose it.
const print = (line) => writeSync(1, JSON.stringify(line) + "\n");

const operations = {
  run: () => runFlow(request),

  async stream() {
    const abort = new AbortController();
    const { stream, output, streamId } = streamFlow({ ...request, abortSignal: abort.signal });
    output.catch(() => {}); // the iteration below raises the same error
    streamId.then((id) => {
      print({ streamId: id });
      if (abortAfter === 0) abort.abort();
    });
    let seen = 0;
    for await (const chunk of stream) {
      print({ chunk });
      if (++seen === abortAfter) abort.abort();
    }
    return output;
  },
};

setTimeout(() => {
  print({ hang: true });
  process.exit(3);
}, timeoutMs);

try {
  print({ output: await operations[op]() });
} catch (error) {
  print({ error: error.message });
}
process.exit(0);
