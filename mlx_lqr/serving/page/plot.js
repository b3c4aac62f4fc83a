// How closely the features follow their setpoints, token by token, at each layer where control acts.

import { drawn, element } from "./dom.js";
import { colour } from "./steering.js";

const HEIGHT = 104; // of a layer's plot, in pixels; the pushes stand in a band at its bottom
const BAND = 22;
const LEFT = 34;
const RIGHT = 8;
const TOP = 8;
const AT_FIRST = 3; // so many layers are shown before somebody chooses
const NOTHING = "Ask something: setpoint, feature and push of every steered layer appear here as the answer is written.";
const OFF = "Not steered: every concept is off.";

/** What an answer's tracking was: for each token a point of (layers, concepts) numbers, null where it was not steered. */
export class Track {
  constructor() {
    this.layers = [];
    this.concepts = [];
    this.points = [];
    this.steered = new Set(); // concepts that were not off all the time
  }

  /** tracking: what the server sent with a token; text: what the token said. */
  add(tracking, text) {
    this.layers = tracking.layers;
    this.concepts = tracking.concepts;
    const { error, push } = tracking;
    // Without the levels themselves: how far the feature is above its setpoint.
    const feature = tracking.feature ?? error.map((row) => row.map((value) => (value === null ? null : -value)));
    const setpoint = tracking.setpoint ?? error.map((row) => row.map(() => 0));
    this.points.push({ feature, setpoint, push, text });
    tracking.concepts.forEach((concept, m) => feature[0][m] !== null && this.steered.add(concept));
  }
}

export class Plot {
  constructor(place) {
    this.track = new Track();
    this.switched = new Map(); // concept -> whether to draw it, where somebody said so
    this.chosen = null; // layers, or null: the last few
    this.at = null; // the token that is read off, or null: the last
    this.order = []; // concepts, in the order of their colours
    this.charts = element("div", { className: "charts", tabIndex: 0, role: "img" });
    this.legend = element("div", { className: "legend" });
    this.choice = element("div", { className: "choice", role: "group", "aria-label": "Layers" });
    this.reading = element("p", { className: "reading" });
    this.none = element("p", { className: "note" });
    place.append(this.none, this.legend, this.choice, this.charts, this.reading);
    this.charts.addEventListener("pointermove", (event) => this.read(this.nearest(event)));
    this.charts.addEventListener("pointerleave", () => this.read(null));
    this.charts.addEventListener("keydown", (event) => this.step(event));
    this.charts.addEventListener("blur", () => this.read(null));
    new ResizeObserver(() => this.refresh()).observe(this.charts);
    this.refresh();
  }

  /** Draw this track from now on. concepts: all that have a slider, in their order. */
  follow(track, concepts) {
    this.track = track;
    this.order = concepts;
    this.at = null;
    this.refresh();
  }

  /** Draw again before the next frame. */
  refresh() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.draw();
    });
  }

  get layers() {
    const { layers } = this.track;
    const chosen = this.chosen && layers.filter((layer) => this.chosen.has(layer));
    return chosen?.length ? chosen : layers.slice(-AT_FIRST);
  }

  /** Concepts that were off all the time are not drawn at first. */
  isShown(concept) {
    return this.switched.get(concept) ?? this.track.steered.has(concept);
  }

  draw() {
    const { points, concepts, steered } = this.track;
    this.none.hidden = steered.size > 0;
    this.none.textContent = points.length ? OFF : NOTHING;
    for (const part of [this.legend, this.choice, this.charts, this.reading]) part.hidden = !steered.size;
    if (!steered.size) return;
    this.drawLegend();
    this.drawChoice();
    this.width = this.charts.clientWidth || 300;
    const shown = [...concepts.keys()].filter((m) => this.isShown(concepts[m]));
    this.charts.replaceChildren(...this.layers.map((layer) => this.chart(layer, shown)));
    this.tell(shown);
  }

  x(token) {
    return LEFT + ((this.width - LEFT - RIGHT) * token) / Math.max(1, this.track.points.length - 1);
  }

  /** A line through heights, with a gap where there is none. */
  path(heights) {
    const parts = [];
    heights.forEach((height, token) => {
      if (height === null) return;
      parts.push(`${token && heights[token - 1] !== null ? "L" : "M"}${this.x(token).toFixed(1)},${height.toFixed(1)}`);
    });
    return parts.join(" ");
  }

  chart(layer, shown) {
    const { points, layers } = this.track;
    const index = layers.indexOf(layer);
    const levels = points.flatMap(({ feature, setpoint }) =>
      shown.filter((m) => feature[index][m] !== null).flatMap((m) => [feature[index][m], setpoint[index][m]]),
    );
    const [low, high] = around(levels);
    const bottom = HEIGHT - BAND - 6;
    const y = (value) => bottom - ((bottom - TOP) * (value - low)) / (high - low);
    const most = Math.max(1e-9, ...points.map((point) => point.push[index]));
    const svg = drawn("svg", { width: this.width, height: HEIGHT, "data-layer": layer });
    for (const value of [low, high]) {
      svg.append(
        drawn("line", { class: "grid", x1: LEFT, x2: this.width - RIGHT, y1: y(value), y2: y(value) }),
        drawn("text", { class: "scale", x: LEFT - 5, y: y(value) + 3.5 }, tick(value, high - low)),
      );
    }
    const floor = HEIGHT - 1;
    const pushes = points.map((point, token) => `${this.x(token)},${floor - (BAND - 4) * (point.push[index] / most)}`);
    const area = [`${this.x(0)},${floor}`, ...pushes, `${this.x(points.length - 1)},${floor}`];
    svg.append(
      drawn("polygon", { class: "push", points: area.join(" ") }),
      drawn("text", { class: "scale", x: LEFT - 5, y: floor - BAND + 11 }, tick(most, most)),
    );
    for (const kind of ["setpoint", "feature"]) {
      for (const m of shown) {
        const heights = points.map((point) => (point.feature[index][m] === null ? null : y(point[kind][index][m])));
        const line = drawn("path", { class: kind, d: this.path(heights) });
        line.style.stroke = this.colourOf(m);
        svg.append(line);
        const token = this.at ?? points.length - 1;
        if (kind === "feature" && heights[token] !== null) {
          const dot = drawn("circle", { cx: this.x(token), cy: heights[token], r: 3 });
          dot.style.fill = this.colourOf(m);
          svg.append(dot);
        }
      }
    }
    if (this.at !== null) {
      const x = this.x(this.at);
      svg.append(drawn("line", { class: "cursor", x1: x, x2: x, y1: TOP, y2: floor }));
    }
    return element("figure", {}, element("figcaption", {}, `Layer ${layer}`), svg);
  }

  colourOf(m) {
    const place = this.order.indexOf(this.track.concepts[m]);
    return colour(place < 0 ? m : place);
  }

  /** A key for the lines, and a switch for each concept where there are several. */
  drawLegend() {
    const { concepts } = this.track;
    const state = concepts.map((concept, m) => `${concept} ${this.colourOf(m)} ${this.isShown(concept)}`).join();
    if (this.legend.state === state) return;
    this.legend.state = state;
    const names = concepts.map((concept, m) => {
      const made = this.chip(concept, this.isShown(concept), () => this.switched.set(concept, !this.isShown(concept)));
      made.style.setProperty("--colour", this.colourOf(m));
      return made;
    });
    const key = ["setpoint", "feature", "push"].map((kind) => {
      const sample =
        kind === "push"
          ? drawn("rect", { class: kind, x: 0, y: 2, width: 18, height: 8 })
          : drawn("line", { class: kind, x1: 0, x2: 18, y1: 6, y2: 6 });
      const svg = drawn("svg", { width: 18, height: 12, "aria-hidden": "true" }, sample);
      return element("span", { className: "sample" }, svg, kind);
    });
    renew(this.legend, ...(concepts.length > 1 ? names : []), ...key);
  }

  /** Where there are more layers than are shown at first: which to show. */
  drawChoice() {
    const { layers } = this.track;
    this.choice.hidden = layers.length <= AT_FIRST;
    const shown = this.layers;
    const state = `${layers} ${shown}`;
    if (this.choice.state === state || this.choice.hidden) return;
    this.choice.state = state;
    const chips = layers.map((layer) =>
      this.chip(layer, shown.includes(layer), () => {
        this.chosen = new Set(shown);
        if (!this.chosen.delete(layer)) this.chosen.add(layer);
      }),
    );
    renew(this.choice, element("span", {}, "Layers"), ...chips);
  }

  /** A switch for something that is drawn or not. */
  chip(label, on, act) {
    const made = element("button", { type: "button", className: "chip", "aria-pressed": String(on) }, String(label));
    made.addEventListener("click", () => {
      act();
      this.refresh();
    });
    return made;
  }

  /** The numbers of the token under the pointer, or of the last. */
  tell(shown) {
    const { points, layers, concepts } = this.track;
    const token = Math.min(this.at ?? points.length - 1, points.length - 1);
    const point = points[token];
    const layer = this.layers.at(-1);
    const index = layers.indexOf(layer);
    const [feature, setpoint] = [point.feature[index], point.setpoint[index]];
    const steered = shown.filter((m) => feature[m] !== null);
    const levels = steered.map((m) => `${concepts[m]} ${figures(feature[m])} of ${figures(setpoint[m])}`);
    const numbers = levels.length ? [...levels, `push ${figures(point.push[index])}`].join(", ") : "not steered";
    const said = point.text.trim() ? `“${point.text.trim()}”` : "no text";
    const line = `Token ${token + 1}, ${said}. Layer ${layer}: ${numbers}`;
    this.reading.textContent = line;
    this.charts.setAttribute("aria-label", `Plot of ${points.length} tokens. ${line}. Arrow keys go from token to token.`);
  }

  read(token) {
    if (token === this.at) return;
    this.at = token;
    this.refresh();
  }

  nearest(event) {
    const last = this.track.points.length - 1;
    const share = (event.clientX - this.charts.getBoundingClientRect().left - LEFT) / (this.width - LEFT - RIGHT);
    return Math.min(last, Math.max(0, Math.round(share * last)));
  }

  step(event) {
    const last = this.track.points.length - 1;
    const from = this.at ?? last;
    const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.read(Math.min(last, Math.max(0, to)));
  }
}

/** Replace the children of an element; the focus stays at its place among them. */
function renew(place, ...children) {
  const held = [...place.children].indexOf(document.activeElement);
  place.replaceChildren(...children);
  if (held >= 0) place.children[held].focus();
}

/** A range with some room around numbers. */
function around(numbers) {
  let [low, high] = [Infinity, -Infinity];
  for (const number of numbers) {
    low = Math.min(low, number);
    high = Math.max(high, number);
  }
  if (low > high) [low, high] = [0, 1];
  const room = 0.08 * (high - low) || Math.max(0.5, 0.1 * Math.abs(high));
  return [low - room, high + room];
}

/** Three significant figures; 0 for what is below a thousandth. */
const figures = (value) => String(Math.abs(value) < 1e-3 ? 0 : Number(value.toPrecision(3)));

const tick = (value, range) => value.toFixed(range < 1 ? 2 : range < 10 ? 1 : 0);
