// What an application writes around each client, which is as its package comes. Each reads one stream to its end, tells each event,
// and returns when the client has stopped.

const TYPES = ["message", "chunk", "done", "error"];

// `error` with an id, `done`, and what OpenAI's streams end with.
const isEnd = ({ event, data, id }, last) => event === "done" || data === "[DONE]" || (event === "error" && id !== last);

// EventSource, and whatever claims to be one: it comes back by itself, and stays closed when a 204 says that nothing is left. It is
// closed as well where it cannot read an answer's head; then the application opens it again.
export const byEventSource = (EventSource) => ({ url, last = "" }, tell) =>
  new Promise((resolve) => {
    let ended = false;
    const open = () => {
      const source = new EventSource(last ? `${url}?lastEventId=${encodeURIComponent(last)}` : url);
      const take = ({ type, data, lastEventId }) => {
        if (data !== undefined) {
          const event = { event: type, data, id: lastEventId };
          ended ||= isEnd(event, last);
          last = lastEventId;
          tell(event);
        } else if (source.readyState === 2) {
          if (ended) resolve();
          else setTimeout(open, 50);
        }
      };
      for (const type of TYPES) source.addEventListener(type, take);
    };
    open();
  });

// fetch-event-source sends its POST again after a cut. Where an answer ends in good order, it asks `onclose` whether it was the end.
export const byFetchEventSource = (fetchEventSource, options = {}) => ({ url, key, body }, tell) => {
  let last = "";
  let ended = false;
  return fetchEventSource(url, {
    method: "POST",
    headers: { "Content-Type": "application/json", "Idempotency-Key": key },
    body: JSON.stringify(body),
    openWhenHidden: true,
    onmessage({ event, data, id }) {
      const told = { event: event || "message", data, id };
      ended ||= isEnd(told, last);
      last = id || last;
      tell(told);
    },
    onclose() {
      if (!ended) throw new Error("the connection was lost");
    },
    ...options,
    ...(options.believesIdsEarly ? {} : { fetch: namingWhatWasGiven(() => last) }),
  });
};

// It takes an id when it has that line, and gives the event one byte later: a cut between the two would lose the event.
const namingWhatWasGiven = (last) => (url, { headers, ...init }) => {
  const { "last-event-id": _, ...others } = headers;
  return fetch(url, { ...init, headers: last() ? { ...others, "last-event-id": last() } : others });
};

// The reference's client, which is no package: it comes back by itself, and returns at the end.
export const byEvents = (events) => async ({ url, key, body }, tell) => {
  const headers = { "Content-Type": "application/json", "Idempotency-Key": key };
  for await (const { id, event, data } of events(url, { method: "POST", headers, body: JSON.stringify(body) })) {
    tell({ id, event, data: JSON.stringify(data) });
  }
};
