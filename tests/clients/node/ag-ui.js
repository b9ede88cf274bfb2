// What an application writes around AG-UI's client, as `docs/how-to/ag-ui.md` has it. It runs an agent, or connects it to a thread, tells
// each event that matters and at the end all messages, and returns when the client has stopped.
import { HttpAgent } from "@ag-ui/client";

process.on("unhandledRejection", () => {}); // HttpAgent leaves one behind when it is cut

class Agent extends HttpAgent {
  requestInit(input) {
    const init = super.requestInit(input);
    return this.isKeyed ? { ...init, headers: { ...init.headers, "idempotency-key": input.runId } } : init;
  }

  connect(input) {
    return new HttpAgent({ url: this.url + "/connect", headers: this.headers }).run(input);
  }
}

async function run(agent, runId, subscriber) {
  const before = agent.messages;
  for (let tries = 0; ; tries++) {
    try {
      return await agent.runAgent({ runId }, subscriber);
    } catch (error) {
      if (error.status || tries === 20) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1000));
      if (agent.isKeyed) agent.setMessages(before);
    }
  }
}

export const read = async ({ url, threadId, runId, question, isKeyed = false }, tell) => {
  const initialMessages = question ? [{ id: "question", role: "user", content: question }] : [];
  const agent = new Agent({ url: `${url}/agent`, threadId, initialMessages });
  agent.isKeyed = isKeyed; // for endpoints that do not know a run by its id
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
