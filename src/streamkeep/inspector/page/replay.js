// A replay: shows a stream's events at the pace at which they came.

import { ask, streamPath } from "./api.js";
import { Schedule } from "./timing.js";
import { $, number, span, timer, write } from "./words.js";

const STEP_MS = 50;
const AHEAD = 400;
const STEPS = 1000;

export class Replay {
  constructor(events, say) {
    this.events = events;
    this.say = say;
    this.isPlaying = false;
    $("play").addEventListener("click", () => (this.isPlaying ? this.pause() : this.play()));
    $("leave").addEventListener("click", () => this.leave());
    $("seek").addEventListener("input", () => this.seek((this.schedule?.duration ?? 0) * ($("seek").valueAsNumber / STEPS)));
    $("speed").addEventListener("change", () => this.retime());
  }

  // Says what there is to be replayed; does not disturb a replay that is under way.
  prepare(stream, timing) {
    this.stream = stream;
    this.timing = timing;
    if (this.schedule) return;
    const schedule = new Schedule(timing, stream);
    $("play").disabled = $("seek").disabled = stream.tail === 0;
    write($("place"), stream.tail ? timer(schedule.duration) : "");
    write($("pace"), pace(schedule, stream));
  }

  start() {
    this.schedule = new Schedule(this.timing, this.stream);
    this.position = 0;
    this.buffer = new Map();
    this.events.replaying = true;
    this.events.clear(0);
    $("leave").hidden = false;
    $("newest").disabled = $("go").disabled = true;
  }

  play() {
    if (!this.schedule) this.start();
    if (this.position >= this.schedule.duration) this.seek(0);
    this.isPlaying = true;
    this.retime();
    write($("play"), "Pause");
    clearInterval(this.beating);
    this.beating = setInterval(() => this.beat(), STEP_MS);
    this.beat();
  }

  pause() {
    this.isPlaying = false;
    clearInterval(this.beating);
    write($("play"), "Play");
  }

  // Another stream is shown, of which nothing is known yet.
  clear() {
    this.end();
    this.stream = this.timing = null;
    $("play").disabled = $("seek").disabled = true;
    write($("place"), "");
    write($("pace"), "");
  }

  // Ends it without a word.
  end() {
    this.pause();
    this.schedule = null;
    this.events.replaying = false;
    $("leave").hidden = true;
    $("newest").disabled = $("go").disabled = false;
    $("seek").value = STEPS;
    write($("play"), "Replay");
  }

  leave() {
    this.end();
    this.prepare(this.stream, this.timing);
    this.events.follow(true);
  }

  retime() {
    this.startedAt = performance.now();
    this.startedFrom = this.position;
  }

  seek(seconds) {
    if (!this.schedule) this.start();
    this.position = seconds;
    this.retime();
    this.events.clear(0);
    this.show();
  }

  beat() {
    const passed = (performance.now() - this.startedAt) / 1000;
    this.position = Math.min(this.schedule.duration, this.startedFrom + passed * Number($("speed").value));
    this.show();
    if (this.position >= this.schedule.duration && this.events.end >= this.schedule.countAt(this.position)) this.pause();
  }

  // Shows what has come by now; of more than fits the newest.
  show() {
    const count = this.schedule.countAt(this.position);
    if (count - this.events.end > AHEAD / 2) this.events.clear(Math.max(0, count - AHEAD / 2));
    const rows = [];
    for (let offset = this.events.end; offset < count && this.buffer.has(offset); offset++) {
      rows.push(this.buffer.get(offset));
      this.buffer.delete(offset);
    }
    this.events.append(rows);
    this.events.note();
    if (this.events.end < count || !this.buffer.has(Math.min(this.events.end + AHEAD / 4, this.stream.tail - 1))) this.fetch(count);
    const { duration } = this.schedule;
    $("seek").value = duration > 0 ? Math.round((STEPS * this.position) / duration) : STEPS;
    write($("place"), `${timer(this.position)} of ${timer(duration)}`);
    $("seek").setAttribute("aria-valuetext", $("place").textContent);
  }

  async fetch(count) {
    const { schedule, events } = this;
    const from = events.end;
    if (this.isFetching || from >= this.stream.tail) return;
    this.isFetching = true;
    try {
      const query = { from, limit: Math.min(500, Math.max(AHEAD, count - from)), life: events.life };
      const { rows } = await ask(streamPath(events.id, "/events"), query);
      if (schedule !== this.schedule) return;
      this.buffer = new Map(rows.map((row) => [row[0], row]));
    } catch (error) {
      if (schedule !== this.schedule) return;
      this.pause();
      this.say(`The replay cannot go on: ${error.message}`);
      return; // who plays on asks again
    } finally {
      this.isFetching = false;
    }
    if (schedule === this.schedule) this.show();
  }
}

function pace(schedule, { tail }) {
  if (tail === 0) return "";
  if (schedule.isSeen) return "All of it was seen to come here: this is its own pace.";
  const between = span(schedule.duration);
  if (schedule.seenFrom === null) return `Nobody here saw it come: its events are spread evenly over the ${between} from its opening to its last one.`;
  const where = schedule.seenFrom > 0 ? `, as before offset ${number(schedule.seenFrom)},` : "";
  return `What was not seen to come here${where} is spread evenly over the time that is known.`;
}
