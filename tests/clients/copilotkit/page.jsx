// A page of CopilotKit's: what `docs/how-to/ag-ui.md` shows, in StrictMode. Its thread is the one that its URL names.
import { Page } from "shown";
import { StrictMode } from "react";
import { createRoot } from "react-dom/client";

const threadId = new URLSearchParams(location.search).get("thread");
createRoot(document.body.appendChild(document.createElement("div"))).render(
  <StrictMode>
    <Page threadId={threadId} />
  </StrictMode>,
);
