// What an application writes around Genkit's client so that lost connections do not show. The how-to on serving shows this
// function; here it runs.
import { createRequire } from "node:module";

// Where the program runs, not where this file is, decides which Genkit. An application imports it.
export const { streamFlow } = createRequire(process.cwd() + "/")("genkit/beta/client");

export async function* reconnecting({ url, input, streamId, onStreamId = () => {}, silenceMs = 60_000, tries = 10 }) {
  let seen = 0;
  let failures = 0;
  while (true) {
    const silence = new AbortController();
    let timer = setTimeout(() => silence.abort(), silenceMs);
    const headers = seen > 0 ? { "X-Genkit-Stream-Offset": String(seen - 1) } : {};
    const answer = streamFlow({ url, input, streamId, headers, abortSignal: silence.signal });
    answer.output.catch(() => {}); // the loop below throws the same error
    answer.streamId.then((id) => onStreamId((streamId ??= id)));
    try {
      for await (const chunk of answer.stream) {
        clearTimeout(timer);
        timer = setTimeout(() => silence.abort(), silenceMs);
        seen++;
        failures = 0;
        yield chunk;
      }
      return await answer.output;
    } catch (error) {
      // fetch throws a TypeError when a connection is lost; the words are the server's when it ends a response before the stream;
      // with "the producer …" the stream itself has met a bound.
      const isLost = error instanceof TypeError || silence.signal.aborted || /^(UNAVAILABLE|DEADLINE_EXCEEDED): (?!the producer )/.test(error.message);
      if (!isLost || !streamId || ++failures === tries) throw error;
      await new Promise((resolve) => setTimeout(resolve, Math.min(100 * 2 ** failures, 5000) * Math.random()));
    } finally {
      clearTimeout(timer);
    }
  }
}
