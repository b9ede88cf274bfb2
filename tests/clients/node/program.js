// Node's: reads with the client that it is started for. A line on stdin is [number, job], one on stdout [number, event], null at the end.
import { createInterface } from "node:readline";

const CLIENTS = {
  eventsource: async () => {
    const [{ EventSource }, { byEventSource }] = await Promise.all([import("eventsource"), import("./readers.js")]);
    return byEventSource(EventSource);
  },
  "@ag-ui/client": async () => (await import("./ag-ui.js")).read,
  "@tanstack/ai-client": async () => (await import("./tanstack-ai.js")).read,
  "@langchain/langgraph-sdk": async () => (await import("./langgraph.js")).read,
  openai: async () => (await import("./openai.js")).read,
};

const read = await CLIENTS[process.argv[2]]();
const say = (number, event) => process.stdout.write(JSON.stringify([number, event]) + "\n");

for await (const line of createInterface({ input: process.stdin })) {
  const [number, job] = JSON.parse(line);
  read(job, (event) => say(number, event)).then(() => say(number, null));
}
process.exit(0);
