// A page of `useStream`: what `docs/how-to/langgraph.md` shows, in StrictMode. Its thread is the one that its URL names.
import { Thread } from "shown";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";

const threadId = new URLSearchParams(location.search).get("thread");
createRoot(document.body.appendChild(document.createElement("div"))).render(
  <StrictMode>
    <Thread threadId={threadId} />
  </StrictMode>,
);
