// The page: what its address names is shown. The address holds the stream and the filter, so that a reload shows the same.

import { hasToken, takeToken } from "./api.js";
import { List } from "./list.js";
import { Stream } from "./stream.js";
import { $, visible, write } from "./words.js";

const TOAST_MS = 5000;
const FILTERS = ["id", "status", "owner", "key"];

takeToken();

let toasting;
let answer;

function say(words) {
  write($("toast"), words);
  $("toast").classList.add("shown");
  clearTimeout(toasting);
  toasting = setTimeout(() => $("toast").classList.remove("shown"), TOAST_MS);
}

function confirm(title, words, yes) {
  write($("confirm-title"), title);
  write($("confirm-words"), visible(words));
  write($("confirm-yes"), yes);
  $("confirm").showModal();
  $("confirm-no").focus();
  return new Promise((resolve) => {
    answer = resolve;
  });
}

$("confirm-yes").addEventListener("click", () => $("confirm").close("yes"));
$("confirm-no").addEventListener("click", () => $("confirm").close("no"));
$("confirm").addEventListener("close", () => {
  answer?.($("confirm").returnValue === "yes");
  $("confirm").returnValue = "";
});

const named = () => new URLSearchParams(location.hash.slice(1));

function address(stream, filter) {
  const parts = Object.entries({ stream: stream ?? "", ...filter }).filter(([, value]) => value);
  return `#${new URLSearchParams(parts)}`;
}

const list = new List((filter) => history.replaceState(null, "", address(named().get("stream"), filter)));
const stream = new Stream({ say, confirm, gone: () => (location.hash = address(null, list.filter)) });

function route() {
  takeToken();
  const id = named().get("stream") || null;
  document.body.dataset.shows = id ? "stream" : "list";
  list.select(id);
  $("back").href = $("skip").href = address(null, list.filter);
  if (id === null) {
    stream.close();
    document.title = "Streams";
  } else if (id !== stream.id) {
    stream.open(id);
    $("main").scrollTop = 0;
    if (document.activeElement?.closest("#list")) $("main").focus({ preventScroll: true });
  }
  const filter = Object.fromEntries(FILTERS.map((name) => [name, list.filter[name]]));
  if (id !== null && location.hash !== address(id, filter)) history.replaceState(null, "", address(id, filter));
}

$("skip").addEventListener("click", (event) => {
  event.preventDefault();
  $("main").focus();
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || $("confirm").open) return;
  const isTyping = event.target.closest("input, select, textarea");
  if (event.key === "/" && !isTyping) {
    event.preventDefault();
    location.hash = address(matchMedia("(max-width: 60rem)").matches ? null : stream.id, list.filter);
    $("id").focus();
  } else if (event.key === "Escape" && !isTyping && stream.id) {
    const from = $("list").querySelector("[aria-current]") ?? $("list").querySelector("a");
    location.hash = address(null, list.filter);
    requestAnimationFrame(() => from?.focus());
  }
});

// A stream that is gone may have been opened anew under its id, and its row leads to where the page is already.
$("list").addEventListener("click", (event) => {
  if (stream.isOver && event.target.closest("[aria-current]")) stream.open(stream.id);
});

// A tab that the browser opens is let in by no token of this window; one that the page opens has a copy of it.
for (const kind of ["click", "auxclick"]) {
  $("list").addEventListener(kind, (event) => {
    const link = event.target.closest("a");
    const isElsewhere = event.ctrlKey || event.metaKey || event.shiftKey || event.button === 1;
    if (!link || !isElsewhere || !hasToken()) return;
    event.preventDefault();
    open(link.href);
  });
}

addEventListener("hashchange", route);
list.start(Object.fromEntries(named()));
route();
