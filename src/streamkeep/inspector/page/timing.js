// What was seen of a stream's pace: rates, latencies, silences, and when each event is to come in a replay. Pure.

const MAX_RUNS = 20_000;

// A run is [first offset, count, when it arrived, latency]: see sightings.py.
export class Timing {
  constructor() {
    this.runs = [];
  }

  // Puts together what several have seen: each of them may have been away for a while.
  static of(...seen) {
    const timing = new Timing();
    timing.add(seen.flat().sort(([one], [other]) => one - other));
    return timing;
  }

  add(runs) {
    for (const run of runs) {
      const last = this.runs.at(-1);
      if (!last || run[0] >= last[0] + last[1]) this.runs.push(run);
    }
    if (this.runs.length > MAX_RUNS) this.runs.splice(0, this.runs.length - MAX_RUNS);
  }

  get isEmpty() {
    return this.runs.length === 0;
  }

  get lastAt() {
    return this.runs.at(-1)[2];
  }

  get firstAt() {
    return this.runs[0][2];
  }

  // The span of time that is drawn: the last minute of what is live, or all that was seen of what has ended.
  window(now, isLive) {
    if (isLive) return { from: Math.floor(now) - 59, to: Math.floor(now) + 1 }; // whole seconds, or bars would tremble
    if (this.isEmpty) return { from: now - 60, to: now };
    return { from: Math.min(this.firstAt, this.lastAt - 10), to: this.lastAt + 0.001 };
  }

  bins({ from, to }, count) {
    const bins = Array.from({ length: count }, () => ({ events: 0, latencies: [] }));
    for (let place = this.runs.length - 1; place >= 0 && this.runs[place][2] >= from; place--) {
      const [, events, at, latency] = this.runs[place];
      const bin = bins[Math.floor(((at - from) / (to - from)) * count)];
      if (!bin) continue;
      bin.events += events;
      bin.latencies.push(latency);
    }
    return bins;
  }

  // The longest waits between events that were both seen to arrive, longest first.
  silences(least, count) {
    const found = [];
    for (let place = 1; place < this.runs.length; place++) {
      const [first, , at] = this.runs[place];
      const [before, events, earlier] = this.runs[place - 1];
      if (before + events === first && at - earlier >= least) found.push({ offset: first, seconds: at - earlier });
    }
    return found.sort((one, other) => other.seconds - one.seconds).slice(0, count);
  }
}

export function median(values) {
  if (values.length === 0) return null;
  const sorted = values.toSorted((one, other) => one - other);
  return sorted[Math.floor(sorted.length / 2)];
}

// When each event came: as it was seen; and where nobody saw it, evenly between what is known before and after.
export class Schedule {
  constructor(timing, stream) {
    const points = [[0, stream.created_at]];
    for (const [first, count, at] of timing.runs) points.push([first, at], [first + count - 1, at]);
    if (stream.tail > 0) points.push([stream.tail - 1, stream.updated_at]);
    this.points = [];
    for (const [offset, at] of points) {
      const last = this.points.at(-1);
      if (last && offset < last[0]) continue;
      this.points.push([offset, last ? Math.max(at, last[1]) : at]);
    }
    this.begin = this.points[0][1];
    this.duration = this.points.at(-1)[1] - this.begin;
    const seen = timing.runs.reduce((sum, [, count]) => sum + count, 0);
    this.isSeen = stream.tail > 0 && seen >= stream.tail;
    this.seenFrom = seen > 0 ? timing.runs[0][0] : null;
  }

  // How many events have come after so many seconds.
  countAt(seconds) {
    const at = this.begin + seconds;
    let low = 0;
    let high = this.points.length; // the first point that is later
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.points[middle][1] <= at) low = middle + 1;
      else high = middle;
    }
    if (low === 0) return 0;
    const [offset, from] = this.points[low - 1];
    if (low === this.points.length) return offset + 1;
    const [next, to] = this.points[low];
    return Math.floor(offset + ((next - offset) * (at - from)) / (to - from)) + 1;
  }
}
