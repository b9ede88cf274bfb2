// The page's: it has every client that is one of browsers.
import { fetchEventSource } from "/packages/@microsoft/fetch-event-source/lib/esm/index.js";

import { events } from "/events.js";
import { byEvents, byEventSource, byFetchEventSource } from "/readers.js";

const CLIENTS = {
  EventSource: byEventSource(EventSource),
  "event-source-polyfill": byEventSource(EventSourcePolyfill),
  "fetch-event-source": byFetchEventSource(fetchEventSource),
  "no package": byEvents(events),
  "fetch-event-source alone": byFetchEventSource(fetchEventSource, { believesIdsEarly: true }),
};

window.read = (client, number, job) => {
  CLIENTS[client](job, (event) => window.tell(number, event)).then(() => window.tell(number, null));
};
