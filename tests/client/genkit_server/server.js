// A server of Genkit's own: flows without a model, with its durable streaming and without. Says its port, and ends with its input.
const { setTimeout } = require("node:timers/promises");

const { expressHandler } = require("@genkit-ai/express");
const express = require("express");
const { genkit, InMemoryStreamManager, UserFacingError, z } = require("genkit/beta");

const ai = genkit({});
let runs = 0;

const count = ai.defineFlow(
  { name: "count", inputSchema: z.number(), streamSchema: z.number() },
  async (to, { sendChunk }) => {
    runs += 1;
    for (let number = 0; number < to; number += 1) {
      sendChunk(number);
      await setTimeout(1);
    }
    return { counted: to, runs };
  },
);

const fail = ai.defineFlow({ name: "fail", inputSchema: z.string() }, async (message, { sendChunk }) => {
  sendChunk("begun");
  throw new UserFacingError("RESOURCE_EXHAUSTED", message, { a: 1 });
});

const app = express();
app.use(express.json());
const streamManager = new InMemoryStreamManager();
for (const flow of [count, fail]) {
  app.post(`/durable/${flow.__action.name}`, expressHandler(flow, { streamManager }));
  app.post(`/plain/${flow.__action.name}`, expressHandler(flow));
}
const server = app.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ port: server.address().port })));
process.stdin.resume().on("end", () => process.exit());
