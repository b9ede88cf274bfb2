// Node's: `Chat` of the AI SDK over `WorkflowChatTransport`, which comes back by itself. A line on stdin is [number, job], one on stdout
// [number, event]: the status and the texts of the answers whenever they change, null at
// the end.
import { createInterface } from "node:readline";

import { Chat } from "@ai-sdk/react";
import { WorkflowChatTransport } from "@ai-sdk/workflow/client";

console.error = () => {}; // where it tells of each cut
const say = (number, event) => process.stdout.write(JSON.stringify([number, event]) + "\n");
const textOf = ({ parts }) => parts.map((part) => part.text ?? JSON.stringify(part)).join("");

const run = async (number, { url, chat: id, ask, initialStartIndex }) => {
  const transport = new WorkflowChatTransport({
    api: `${url}/api/chat`,
    initialStartIndex,
    prepareSendMessagesRequest: ({ id, messages, trigger, messageId }) => ({
      body: { id, messages, trigger, messageId },
      headers: { "Content-Type": "application/json" },
    }),
  });
  const chat = new Chat({ id, transport });
  const tell = () => {
    const answers = chat.messages.filter(({ role }) => role === "assistant").map(textOf);
    say(number, { event: chat.status, data: JSON.stringify(answers), id: chat.error?.message ?? "" });
  };
  chat["~registerMessagesCallback"](tell); // as `useChat` does
  await (ask ? chat.sendMessage({ text: ask }) : chat.resumeStream());
  tell();
  say(number, null);
};

for await (const line of createInterface({ input: process.stdin })) run(...JSON.parse(line));
process.exit(0);
