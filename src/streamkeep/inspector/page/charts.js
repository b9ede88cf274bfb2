// The two charts, as SVG: bars of events per second, and latencies as a bar from the median to the worst.

import { median } from "./timing.js";
import { $, number, span, write } from "./words.js";

const BINS = 60;
const WIDTH = 600;
const HEIGHT = 80;
const SVG = "http://www.w3.org/2000/svg";

export function draw(timing, now, isLive) {
  const window_ = timing.window(now, isLive);
  const bins = timing.bins(window_, BINS);
  drawRate(bins, window_, isLive);
  drawLatency(bins);
  for (const name of ["rate", "latency"]) {
    write($(`${name}-from`), isLive ? `${span(window_.to - window_.from)} ago` : timing.isEmpty ? "" : `${span(window_.to - window_.from)} before`);
    write($(`${name}-to`), isLive ? "now" : timing.isEmpty ? "" : "the last that was seen");
  }
}

function drawRate(bins, { from, to }, isLive) {
  const seconds = (to - from) / BINS;
  const rates = bins.map(({ events }) => events / seconds);
  const most = Math.max(...rates);
  bars($("rate"), rates.map((rate) => [0, rate]), nice(most));
  if (most === 0) return write($("rate-words"), isLive ? "nothing came in the last minute" : "nobody here saw it come");
  const newest = rates.at(-2) ?? 0; // the last bin is not full yet
  write($("rate-words"), isLive ? `now ${rate(newest)} · most ${rate(most)}` : `most ${rate(most)}`);
}

function drawLatency(bins) {
  const ranges = bins.map(({ latencies }) => (latencies.length ? [median(latencies), Math.max(...latencies)] : null));
  const all = bins.flatMap(({ latencies }) => latencies);
  const worst = all.reduce((one, other) => Math.max(one, other), 0);
  const scale = nice(worst) || 0.001;
  bars($("latency"), ranges.map((range) => range && [0, range[1]]), scale, ranges.map((range) => range && range[0]));
  write($("latency-words"), all.length ? `median ${span(median(all))} · worst ${span(worst)}` : "nothing to measure");
}

const rate = (value) => `${value < 10 && value % 1 ? value.toFixed(1) : number(Math.round(value))}/s`;

// The next of 1, 2, 5, 10, … above a value.
function nice(value) {
  if (value <= 0) return 0;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

// Keeps the elements that are there: they are drawn anew several times a second.
function bars(svg, ranges, scale, marks = []) {
  const width = WIDTH / BINS;
  ranges.forEach((range, place) => {
    const bar = child(svg, 2 * place, "bar");
    const mark = child(svg, 2 * place + 1, "mark");
    const height = range && scale ? (HEIGHT * (range[1] - range[0])) / scale : 0;
    box(bar, place * width + 1, HEIGHT - height, width - 2, height);
    const at = marks[place];
    const isMarked = at !== undefined && at !== null;
    box(mark, place * width + 1, HEIGHT - (isMarked ? (HEIGHT * at) / scale : 0) - (isMarked ? 2 : 0), width - 2, isMarked ? 2 : 0);
  });
}

function child(svg, place, kind) {
  if (svg.children[place]) return svg.children[place];
  const made = document.createElementNS(SVG, "rect");
  made.setAttribute("class", kind);
  svg.append(made);
  return made;
}

function box(rect, x, y, width, height) {
  const values = { x: x.toFixed(1), y: Math.max(0, y).toFixed(1), width: width.toFixed(1), height: Math.max(0, height).toFixed(1) };
  for (const [name, value] of Object.entries(values)) if (rect.getAttribute(name) !== value) rect.setAttribute(name, value);
}
