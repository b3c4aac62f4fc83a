// A slider for each concept: its strength, with marks at the budgets that the controller knows.

import { element, short } from "./dom.js";

const BUDGETS = ["gentle", "normal", "strong"];
const COLOURS = 6; // in style.css: --colour-0 and so on

/** The colour of a concept, by its place among all that there are. */
export const colour = (index) => `var(--colour-${index % COLOURS})`;

export class Sliders {
  /**
   * place: where the rows go. onChange: called after each change of a strength.
   * menu: [label, what to call with a controller] for each line of a row's menu.
   */
  constructor(place, { onChange, menu }) {
    this.place = place;
    this.onChange = onChange;
    this.menu = menu;
    this.rows = new Map(); // concept -> row
  }

  /** Rows for these controllers. Strengths of concepts that had a row already stay. */
  show(controllers) {
    const before = this.rows;
    this.rows = new Map();
    for (const controller of controllers) {
      for (const concept of controller.concepts) {
        const row = new Row(concept, controller, this.rows.size, this);
        const known = before.get(concept);
        row.set(known?.controller.id === controller.id ? known.value : controller.default);
        this.rows.set(concept, row);
      }
    }
    this.place.replaceChildren(...[...this.rows.values()].map((row) => row.element));
  }

  get concepts() {
    return [...this.rows.keys()];
  }

  /** Concept -> strength, those at 0 among them, so that they can be raised while an answer is written. */
  get strengths() {
    return Object.fromEntries([...this.rows].map(([concept, row]) => [concept, row.value]));
  }

  /** Set a concept to its recommended strength. */
  recommend(concept) {
    const row = this.rows.get(concept);
    if (row) row.set(row.recommended);
  }
}

class Row {
  constructor(concept, controller, place, sliders) {
    this.controller = controller;
    this.sliders = sliders;
    this.budgets = controller.budgets;
    this.recommended = controller.strength ?? (controller.default || 1);
    const [low, high] = this.limits();
    this.low = low;
    this.high = high;
    const step = high - low > 20 ? 1 : 0.05;
    const name = `strength-${place}`;
    const title = "Double-click: the recommended strength";
    const limits = { min: low, max: high, step };
    this.range = element("input", { type: "range", id: name, ...limits, title, "aria-label": `${concept}, strength` });
    this.number = element("input", { type: "number", step: "any", "aria-label": `${concept}, strength as a number` });
    this.presets = this.levels().map(([label, value]) => {
      const said = { title: short(value), "aria-label": `${concept}: ${label}` };
      const made = element("button", { type: "button", ...said }, label);
      made.value = value;
      made.addEventListener("click", () => this.change(value));
      return made;
    });
    const marks = this.levels().map(([, value]) => {
      const made = element("i", { className: value === 0 ? "mark zero" : "mark" });
      made.style.setProperty("--at", this.share(value));
      return made;
    });
    const origin = `${controller.method}, layers ${controller.layers.join(", ")}`;
    this.element = element(
      "div",
      { className: "concept" },
      element(
        "div",
        { className: "name" },
        element("label", { htmlFor: name, title: origin }, concept),
        this.number,
        this.moreFor(concept),
      ),
      element("div", { className: "track" }, ...marks, this.range),
      element("div", { className: "presets", role: "group", "aria-label": `Strengths of ${concept}` }, ...this.presets),
    );
    this.element.style.setProperty("--colour", colour(place));
    this.range.addEventListener("input", () => this.change(Number(this.range.value)));
    this.range.addEventListener("dblclick", () => this.change(this.recommended));
    this.number.addEventListener("change", () => {
      this.change(this.number.value === "" ? this.recommended : Number(this.number.value));
    });
  }

  /** From minus the strong strength to one and a half times it; -5 to 5 where no budget is known. */
  limits() {
    if (!this.budgets) {
      const reach = Math.max(5, Math.ceil(1.5 * Math.abs(this.recommended)));
      return [-reach, reach];
    }
    const known = BUDGETS.map((budget) => this.budgets[budget]);
    const most = known.reduce((one, other) => (Math.abs(other) > Math.abs(one) ? other : one)); // angles fall
    return most > 0 ? [-most, 1.5 * most] : [1.5 * most, -most];
  }

  levels() {
    const off = ["Off", 0];
    if (!this.budgets) return [off, ["Recommended", this.recommended]];
    return [off, ...BUDGETS.map((budget) => [budget[0].toUpperCase() + budget.slice(1), this.budgets[budget]])];
  }

  /** Where a strength stands on the slider: 0 at its left end, 1 at its right. */
  share(value) {
    return Math.min(1, Math.max(0, (value - this.low) / (this.high - this.low)));
  }

  moreFor(concept) {
    const lines = [
      ["Reset", () => this.change(this.recommended)],
      ...this.sliders.menu.map(([label, act]) => [label, () => act(this.controller)]),
    ];
    const menu = element("details", { className: "menu" });
    const buttons = lines.map(([label, act]) => {
      const made = element("button", { type: "button" }, label);
      made.addEventListener("click", () => {
        menu.open = false;
        act();
      });
      return made;
    });
    menu.append(element("summary", { "aria-label": `More for ${concept}` }, "⋯"), element("div", {}, ...buttons));
    menu.addEventListener("focusout", (event) => {
      if (!menu.contains(event.relatedTarget)) menu.open = false;
    });
    menu.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !menu.open) return;
      event.stopPropagation();
      menu.open = false;
      menu.firstElementChild.focus();
    });
    return menu;
  }

  change(value) {
    this.set(value);
    this.sliders.onChange();
  }

  set(value) {
    this.value = value;
    this.range.value = value;
    this.range.setAttribute("aria-valuetext", short(value));
    this.number.value = short(value);
    const [from, to] = [this.share(0), this.share(value)].sort((one, other) => one - other);
    this.range.style.setProperty("--from", from);
    this.range.style.setProperty("--to", to);
    for (const preset of this.presets) preset.setAttribute("aria-pressed", Math.abs(preset.value - value) < 5e-4);
  }
}
