// The page of the clients that chat: what an application writes around each, which is as its package comes. `ask` sends a question; what
// the chat shows is told whenever it changes: its status, the texts of its answers, and its error.
import { useChat } from "@ai-sdk/react";
import { AssistantRuntimeProvider } from "@assistant-ui/react";
import { AssistantChatTransport, createResumableSessionStorage, useChatRuntime } from "@assistant-ui/react-ai-sdk";
import { DefaultChatTransport } from "ai";
import { StrictMode, createElement, useEffect } from "react";
import { createRoot } from "react-dom/client";

const isShown = ({ type }) => type !== "step-start";
// As the page has it: of an answer that was begun again, what is behind that.
const newest = ({ parts }) => parts.slice(parts.findLastIndex(({ type }) => type === "data-restarted") + 1);
const textOf = (message) => newest(message).filter(isShown).map((part) => part.text ?? JSON.stringify(part)).join("");
const answersIn = (messages) => messages.filter(({ role }) => role === "assistant");

const shown = (status, messages, error) => ({
  event: status,
  data: JSON.stringify(answersIn(messages).map(textOf)),
  id: error?.message ?? "",
});

// Resolves when a chat that begins has asked whether something runs, twice in StrictMode: a user takes longer than that.
const asking = (url, more) => {
  let [settled, outstanding] = [undefined, 0];
  const settling = new Promise((resolve) => (settled = resolve));
  const asked = (input, init) => {
    outstanding += 1;
    return (more.fetch ?? fetch)(input, init).finally(() => setTimeout(() => --outstanding || settled()));
  };
  const transport = new DefaultChatTransport({ ...more, api: `${url}/api/chat`, fetch: asked });
  return [transport, settling];
};

// Of an endpoint that knows no chats the page keeps the stream.
const keepingTheStream = (url) => ({
  fetch: async (input, init) => {
    const answer = await fetch(input, init);
    const stream = answer.headers.get("x-workflow-run-id");
    if (stream) sessionStorage.setItem("stream", stream);
    return answer;
  },
  prepareReconnectToStreamRequest: () => ({ api: `${url}/api/streams/${sessionStorage.getItem("stream") ?? "none"}` }),
});

// Something on the way sends a POST again, and its sender is given the second answer.
const sendingTwice = {
  fetch: async (input, init) => {
    if (init?.method !== "POST") return fetch(input, init);
    const first = await fetch(input, init);
    void first.body.cancel();
    return fetch(input, init);
  },
};

// A page that keeps nothing shows what the server has, and tells it which answer that ends with.
const keptByTheServer = async (job) => {
  const history = await (await fetch(`${job.url}/api/chat/${job.chat}/messages`)).json();
  const seen = history.at(-1)?.id ?? "";
  return [history, { prepareReconnectToStreamRequest: ({ id }) => ({ api: `${job.url}/api/chat/${id}/stream?seen=${seen}` }) }];
};

const [chats, doing, finished] = [new Map(), new Map(), new Map()];

const Chat = ({ number, job, transport }) => {
  const onFinish = () => finished.set(number, (finished.get(number) ?? 0) + 1);
  const chat = useChat({ id: job.chat, messages: job.history, transport, resume: true, onFinish });
  const { messages, status, error } = chat;
  useEffect(() => void window.tell(number, shown(status, messages, error)), [messages, status, error]);
  useEffect(() => void chats.set(number, (text) => chat.sendMessage({ text })));
  useEffect(() => void doing.set(number, chat));
  // The user looks at the page whenever something has gone wrong, if the job says so.
  useEffect(() => void (job.returns && error && setTimeout(() => document.dispatchEvent(new Event("visibilitychange")), 50)), [error]);
  return null;
};

const byUseChat = async (number, job) => {
  let more = job.keepsStream ? keepingTheStream(job.url) : job.sendsTwice ? sendingTwice : {};
  if (job.keptByTheServer) [job.history, more] = await keptByTheServer(job);
  const [transport, settling] = asking(job.url, more);
  const chat = createElement(Chat, { number, job, transport });
  createRoot(document.body.appendChild(document.createElement("div"))).render(createElement(StrictMode, {}, chat));
  await settling;
};

const Assistant = ({ number, job }) => {
  const storage = createResumableSessionStorage();
  const transport = new AssistantChatTransport({
    api: `${job.url}/api/chat`,
    resumable: { storage, resumeApi: (stream) => `${job.url}/api/chat/${stream}/stream` },
  });
  const runtime = useChatRuntime({ transport, onResumeError: (error) => window.tell(number, shown("error", [], error)) });
  useEffect(() => {
    const tell = () => {
      const { messages, isRunning } = runtime.thread.getState();
      const answers = messages.map(({ role, content }) => ({ role, parts: content }));
      const failed = messages.at(-1)?.status?.reason === "error";
      const event = shown(isRunning ? "streaming" : failed ? "error" : "ready", answers);
      window.tell(number, { ...event, id: storage.getStreamId() ?? "" });
    };
    tell();
    return runtime.thread.subscribe(tell);
  }, [runtime]);
  useEffect(() => void chats.set(number, (text) => runtime.thread.append({ role: "user", content: [{ type: "text", text }] })));
  return createElement(AssistantRuntimeProvider, { runtime });
};

const byAssistantUI = async (number, job) => {
  createRoot(document.body.appendChild(document.createElement("div"))).render(createElement(Assistant, { number, job }));
};

const CLIENTS = { useChat: byUseChat, "assistant-ui": byAssistantUI };

window.read = async (client, number, job) => {
  await CLIENTS[client](number, job);
  while (!chats.has(number)) await new Promise((resolve) => setTimeout(resolve, 10));
  if (job.ask) await chats.get(number)(job.ask);
};

// What a user of `useChat` does besides: `regenerate()`, and `sendMessage` in place of the last question.
window.regenerate = (number) => void doing.get(number).regenerate();
window.edit = (number, text) => {
  const { id: messageId } = doing.get(number).messages.findLast(({ role }) => role === "user");
  void doing.get(number).sendMessage({ text, messageId });
};
window.finished = (number) => finished.get(number) ?? 0;
window.restarts = (number) => doing.get(number).messages.at(-1).parts.filter(({ type }) => type === "data-restarted").length;
