// Reads a stream to its end with the protocol's own client: `node read.js MODE URL [OFFSET]`. Each line it prints is a batch, as JSON; the
// last one is how it ended.
import { stream } from "@durable-streams/client"

const [mode, url, offset] = process.argv.slice(2)
const say = (value) => process.stdout.write(`${JSON.stringify(value)}\n`)
const backoffOptions = { maxRetries: 20, initialDelay: 20, maxDelay: 200 }
const live = mode === "auto" ? true : mode

// With `live: false` it reads one page: whoever wants all asks for the next one.
async function catchUp() {
  let response
  do {
    response = await stream({ url, offset: response?.offset ?? offset, live: false, json: true, backoffOptions })
    say({ items: await response.json(), offset: response.offset })
  } while (!response.upToDate)
  return response
}

async function follow() {
  const response = await stream({ url, offset, live, json: true, backoffOptions })
  const read = new Promise((resolve) => {
    response.subscribeJson(async (batch) => {
      say({ items: batch.items, offset: batch.offset })
      if (batch.streamClosed) resolve()
    })
  })
  await Promise.race([read, response.closed.then(() => read)]) // `closed` may come before the last batch, and tells of errors
  return response
}

try {
  const response = await (mode === "catch-up" ? catchUp() : follow())
  say({ closed: response.streamClosed, offset: response.offset })
} catch (error) {
  say({ error: error.status ?? String(error), code: error.code })
}
