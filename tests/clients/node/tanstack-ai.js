// What an application writes around TanStack AI's client, as `docs/how-to/ag-ui.md` has it. It sends a message, or goes on with a run
// after a reload, tells each event that matters and at the end all messages, and returns when the client has stopped.
import { ChatClient, fetchServerSentEvents } from "@tanstack/ai-client";

const textOf = ({ parts }) => parts.map(({ content }) => content ?? "").join("");

export const read = async ({ url, threadId, runId, question }, tell) => {
  const asked = { id: "question", role: "user", parts: [{ type: "text", content: question }] };
  const ended = Promise.withResolvers();
  const client = new ChatClient({
    connection: fetchServerSentEvents(`${url}/agent`, { reconnect: { maxAttempts: 40 } }),
    threadId,
    initialMessages: runId ? [asked] : [],
    initialResumeSnapshot: runId && { resumeState: { threadId, runId } },
    onRunIdChange: (id) => id && tell({ event: "run", data: id }),
    onChunk({ type, delta, code }) {
      if (type === "TEXT_MESSAGE_CONTENT") tell({ event: "text", data: delta });
      else if (type === "RUN_ERROR") tell({ event: "failed", data: code ?? "" });
      else if (type === "RUN_FINISHED") tell({ event: "finished", data: "" });
    },
    onError: (error) => tell({ event: "thrown", data: String(error) }),
    onLoadingChange: (isLoading) => isLoading || ended.resolve(),
  });
  client.attach();
  if (!runId) await client.sendMessage(question);
  await ended.promise;
  tell({ event: "messages", data: JSON.stringify(client.getMessages().map((message) => [message.role, textOf(message)])) });
};
