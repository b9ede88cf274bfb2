// What an application writes around LangGraph's client, as `docs/how-to/langgraph.md` has it. It starts a run, or joins one, tells each
// event and what is thrown, and returns when the client has stopped.
import { Client } from "@langchain/langgraph-sdk";

export const read = async ({ url, thread, input, run, stops }, tell) => {
  const client = new Client({ apiUrl: url, apiKey: null });
  if (stops) await client.runs.cancel(thread, run);
  else
    try {
      const onRunCreated = ({ run_id }) => tell({ event: "created", data: run_id, id: "" });
      const parts = run
        ? client.runs.joinStream(thread, run, { lastEventId: "-1" })
        : client.runs.stream(thread, "answer", { input, onRunCreated });
      for await (const { event, data, id } of parts) tell({ event, data: JSON.stringify(data), id });
    } catch (error) {
      tell({ event: "thrown", data: JSON.stringify(String(error)), id: "" });
    }
};
