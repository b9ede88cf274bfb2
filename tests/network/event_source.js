// Run in a page: reads streams by EventSource, all at once, until each has been told to stay closed.
//
// An EventSource comes back by itself from a lost connection, but not from an answer that it cannot read (then it is CLOSED), and it
// never notices that nothing comes any more. In these two cases a page has to begin anew, behind what it has seen.
([urls, silenceMs]) => {
  const read = (url) =>
    new Promise((resolve) => {
      const outcome = { chunks: [], reopened: 0 };
      let last = null;
      let ended = false;
      let watchdog;

      const connect = () => {
        const events = new EventSource(last === null ? url : `${url}?after=${last}`);
        const reopen = () => {
          events.close();
          outcome.reopened++;
          setTimeout(connect, 50);
        };
        const watch = () => {
          clearTimeout(watchdog);
          watchdog = setTimeout(reopen, silenceMs);
        };
        const end = (event) => {
          ended = true;
          last = event.lastEventId;
        };
        events.onopen = watch;
        events.addEventListener("chunk", (event) => {
          watch();
          last = event.lastEventId;
          outcome.chunks.push(JSON.parse(event.data));
        });
        events.addEventListener("done", (event) => {
          outcome.output = JSON.parse(event.data);
          end(event);
        });
        events.addEventListener("error", (event) => {
          watch();
          if (event.data) {
            outcome.error = JSON.parse(event.data).status;
            end(event);
          } else if (events.readyState === EventSource.CLOSED) {
            clearTimeout(watchdog);
            if (ended) resolve(outcome);
            else reopen();
          }
        });
        watch();
      };
      connect();
    });
  return Promise.all(urls.map(read));
};
