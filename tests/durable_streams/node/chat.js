// A chat of the AI SDK over durable streams, with the protocol's own transport: `node chat.js URL`. The answer is written to the stream at
// the URL while it is read from there, and read again by who reconnects. It prints what each of the two was given, as a line of JSON.
import { createDurableChatTransport, toDurableStreamResponse } from "@durable-streams/aisdk-transport"

const url = process.argv[2]
const answer = [
  { type: "start", messageId: "m1" },
  { type: "text-start", id: "t" },
  ...Array.from({ length: 50 }, (_, number) => ({ type: "text-delta", id: "t", delta: `wörd ${number}\n` })),
  { type: "text-end", id: "t" },
  { type: "finish" },
]

async function* source() {
  yield* answer
}

const writes = []
const transport = createDurableChatTransport({
  api: "http://app.invalid/api/chat",
  reconnectApi: "http://app.invalid/api/chat/1/stream",
  fetchClient: async (_, init) =>
    init?.method === "POST"
      ? toDurableStreamResponse({ source: source(), stream: { writeUrl: url }, waitUntil: (write) => writes.push(write) })
      : Response.json({ streamUrl: url }, { headers: { Location: url } }),
})

async function all(stream) {
  const chunks = []
  for await (const chunk of stream) chunks.push(chunk)
  process.stdout.write(`${JSON.stringify({ items: chunks, whole: JSON.stringify(chunks) === JSON.stringify(answer) })}\n`)
}

await all(await transport.sendMessages({ chatId: "1", messages: [], trigger: "submit-message", abortSignal: undefined }))
await Promise.all(writes)
await all(await transport.reconnectToStream({ chatId: "1" }))
