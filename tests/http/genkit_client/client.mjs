// Drives Genkit's official client for tests: one JSON command as the argument, JSON lines as they happen on stdout.
//
//   {"op": "stream", "url", "input"?, "init"?, "headers"?, "streamId"?, "abortAfter"?, "timeoutMs"?}
//       {"streamId": …}, {"chunk": …} for each, then {"output": …} or {"error": "message"}
//       abortAfter: abort after so many chunks; 0 means as soon as the answer's headers are there
//   {"op": "run", "url", "input"?, "init"?, "headers"?, "timeoutMs"?}
//       {"output": …} or {"error": "message"}
//   {"op": "agent", "url", "headers"?, "init"?, "steps": [[what, argument?], …]}
//       one chat of `remoteAgent`, step by step; {"chunk": …} as they come, and of each step {"step": what, …} or {"error", "status"}
//       send: a turn, by a text or an input; detach: one in the background; wait: for its end; abort: it; resume: a turn;
//       load: go on in a chat that is stored; snapshot: what is stored; read: the stream of the one in the background, to the end
//
// Ends by itself, after timeoutMs with {"hang": true} and exit code 3. Only where the client spins in microtasks, as it does when
// a body ends without a terminal frame, no timer ever fires, and the caller must kill this process.
import { writeSync } from "node:fs";

import { remoteAgent, runFlow, streamFlow } from "genkit/beta/client";

import { reconnecting } from "../../network/reconnecting.mjs";

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

const shown = (response) => ({
  text: response.text,
  finishReason: response.finishReason,
  snapshotId: response.snapshotId,
  sessionId: response.sessionId,
  state: response.state,
  interrupts: response.interrupts.map(({ name, ref, input }) => ({ name, ref, input })),
  messages: response.messages.length,
});

operations.agent = async () => {
  const { steps, init, timeoutMs: _, ...options } = request;
  const agent = remoteAgent(options);
  let chat = agent.chat(init);
  let task;
  const turn = async (turn) => {
    for await (const chunk of turn.stream) print({ chunk: chunk.raw });
    return shown(await turn.response);
  };
  const taken = {
    send: (input) => turn(chat.sendStream(input)),
    resume: (resume) => turn(chat.resumeStream(resume)),
    detach: async (input) => ({ snapshotId: (task = await chat.detach(input)).snapshotId }),
    wait: async () => ({ snapshot: await task.wait({ intervalMs: 20 }) }),
    abort: async (id) => ({ status: await (id ? agent.abort(id) : task.abort()) }),
    snapshot: async (lookup) => ({ snapshot: await agent.getSnapshot(lookup ?? chat.snapshotId) }),
    read: async (streamId = task.snapshotId) => {
      const reading = reconnecting({ url: options.url, streamId });
      for (;;) {
        const { done, value } = await reading.next();
        if (done) return { output: value };
        print({ chunk: value });
      }
    },
    load: async (lookup) => ({ messages: (chat = await agent.loadChat(lookup)).messages.length }),
  };
  for (const [step, argument] of steps) {
    try {
      print({ step, ...(await taken[step](argument)) });
    } catch (error) {
      print({ step, error: error.message, status: error.status });
    }
  }
  return steps.length;
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
