// What an application writes around OpenAI's client, as `docs/how-to/openai.md` has it. It starts a response, or comes back to one, until that
// has ended; it tells each event and what is thrown, and returns then. `stops` cancels, `looks` tells the response as it is.
import OpenAI from "openai";

const ENDS = ["completed", "failed", "incomplete"];
const told = (event, value, id = "") => ({ event, data: JSON.stringify(value), id: String(id) });

export const read = async ({ url, ask, id, seen, stops, looks, key }, tell) => {
  const client = new OpenAI({ apiKey: "none", baseURL: `${url}/v1`, dangerouslyAllowBrowser: true });
  const options = key ? { headers: { "Idempotency-Key": key } } : {};
  let tries = 0, ended = false;
  const show = async (events) => {
    for await (const event of events) {
      [id, seen, tries] = [event.response?.id ?? id, event.sequence_number, 0];
      ended = ENDS.includes(event.type.replace("response.", ""));
      tell(told(event.type, event, seen));
    }
  };
  try {
    if (stops) return tell(told("status", await client.responses.cancel(id)));
    if (looks) return tell(told("status", await client.responses.retrieve(id)));
    if (ask)
      try {
        await show(await client.responses.create({ ...ask, stream: true, background: true }, options));
      } catch (error) {
        if (!id) throw error;
      }
    while (!ended)
      try {
        await show(await client.responses.retrieve(id, { stream: true, starting_after: seen }));
      } catch (error) {
        if (error.status || ++tries > 20) throw error;
        await new Promise((resolve) => setTimeout(resolve, 100));
      }
  } catch (error) {
    tell(told("thrown", error.status ?? String(error)));
  }
};
