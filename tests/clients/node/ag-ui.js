// What an application writes around AG-UI's client, as `docs/how-to/ag-ui.md` has it. It runs an agent, or connects it to a thread, tells
// each event that matters and at the end all messages, and returns when the client has stopped.
import { HttpAgent } from "@ag-ui/client";

process.on("unhandledRejection", () => {}); // HttpAgent leaves one behind when it is cut

class Agent extends HttpAgent {
  connect(input) {
    return new HttpAgent({ url: this.url + "/connect", headers: this.headers }).run(input);
  }
}

async function run(agent, runId, subscriber) {
  for (let tries = 0; ; tries++) {
    try {
      return await agent.runAgent({ runId }, subscriber);
    } catch (error) {
      if (error.status || tries === 5) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
    }
  }
}

export const read = async ({ url, threadId, runId, question }, tell) => {
  const initialMessages = question ? [{ id: "question", role: "user", content: question }] : [];
  const agent = new Agent({ url: `${url}/agent`, threadId, initialMessages });
  const subscriber = {
    onTextMessageContentEvent: ({ event }) => tell({ event: "text", data: event.delta }),
    onRunErrorEvent: ({ event }) => tell({ event: "failed", data: event.code }),
    onRunFinishedEvent: () => tell({ event: "finished", data: "" }),
  };
  try {
    await (runId ? run(agent, runId, subscriber) : agent.connectAgent({}, subscriber));
  } catch (error) {
    tell({ event: "thrown", data: String(error) });
  }
  tell({ event: "messages", data: JSON.stringify(agent.messages.map(({ role, content }) => [role, content])) });
};
