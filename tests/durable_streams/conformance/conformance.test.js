// The suite's own command line tool does not work: it is run from a test file.
import { runConformanceTests } from "@durable-streams/server-conformance-tests"

runConformanceTests({ baseUrl: process.env.SERVER_URL, longPollTimeoutMs: 500, subscriptions: true })
