// Node's: `Chat` of the AI SDK with tools that the page runs. A line on stdin is [number, job], one on stdout [number, event]: each call of
// `onToolCall`, at the end the status and the parts of the answer, then null. Without `ask` it is a page that is loaded again.
import { createInterface } from "node:readline";

import { Chat } from "@ai-sdk/react";
import { DefaultChatTransport } from "ai";

const say = (number, event) => process.stdout.write(JSON.stringify([number, event]) + "\n");

const run = async (number, { url, chat: id, ask, history }) => {
  const transport = new DefaultChatTransport({ api: `${url}/api/chat` });
  const onToolCall = ({ toolCall }) => say(number, { event: "tool", data: toolCall.toolCallId, id: "" });
  const chat = new Chat({ id, transport, onToolCall, messages: history });
  await (ask ? chat.sendMessage({ text: ask }) : chat.resumeStream());
  say(number, { event: chat.status, data: JSON.stringify(chat.lastMessage?.parts ?? null), id: "" });
  say(number, null);
};

for await (const line of createInterface({ input: process.stdin })) run(...JSON.parse(line));
process.exit(0);
