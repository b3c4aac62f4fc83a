// One answer of the model: its request, its text as it streams, and what came of it.

import { element, say, short } from "./dom.js";
import { show } from "./prose.js";
import { events, request } from "./server.js";

const PAUSE = 100; // milliseconds between two changes of the steering of a running answer

export class Answer {
  /** kind: "steered" or "unsteered". track: a Track that is filled, or null. onToken: called after each token. */
  constructor(kind, { track = null, onToken = () => {} } = {}) {
    this.kind = kind;
    this.track = track;
    this.onToken = onToken;
    this.text = "";
    this.changes = []; // where in the text the steering changed
    this.tokens = 0;
    this.done = false;
    this.label = element("h3", {}, kind === "steered" ? "Steered" : "Unsteered");
    const spoken = { role: "group", "aria-label": `${kind} answer`, "aria-live": "polite", "aria-busy": "true" };
    this.prose = element("div", { className: "prose", ...spoken });
    this.error = element("p", { className: "error", role: "alert", hidden: true });
    this.made = element("span", { className: "made" });
    this.copy = element("button", { type: "button", className: "quiet", "aria-label": `Copy the ${kind} answer` }, "Copy");
    this.copy.addEventListener("click", () => this.copied());
    this.after = element("div", { className: "after", hidden: true }, this.copy, this.made);
    const className = `answer ${kind} writing`;
    this.element = element("section", { className }, this.label, this.prose, this.error, this.after);
  }

  /** Stream an answer; ends when it is whole, stopped or failed. body: the request without the steering. */
  async write(body, strengths, signal) {
    this.strengths = strengths;
    this.used = [strengths];
    this.tell();
    const track = this.track !== null && Object.keys(strengths).length > 0;
    const asked = { ...body, steering: strengths, track, stream: true };
    try {
      for await (const chunk of events("v1/chat/completions", asked, signal)) this.take(chunk);
    } catch (error) {
      if (error.name === "AbortError") this.finish = "stopped";
      else say(this.error, error.message);
    }
    this.done = true;
    this.draw();
    this.element.classList.remove("writing");
    this.prose.setAttribute("aria-busy", "false");
    this.made.textContent = this.ending();
    this.after.hidden = false;
    this.copy.hidden = !this.text;
    this.onToken();
  }

  take(chunk) {
    this.id ??= chunk.id;
    const choice = chunk.choices[0];
    const text = choice?.delta.content ?? "";
    this.text += text;
    if (chunk.usage) this.tokens = chunk.usage.completion_tokens;
    else if (choice && (text || chunk.tracking)) this.tokens += 1;
    if (chunk.tracking) this.track?.add(chunk.tracking, text);
    if (this.tokens === 1) this.begun ??= performance.now();
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    this.frame ??= requestAnimationFrame(() => this.draw());
    if (this.behind) this.steer(this.strengths);
    this.onToken();
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = null;
    show(this.prose, this.text, this.changes);
    this.onDrawn?.();
  }

  /** How it ended, and how fast it was from its first token on. */
  ending() {
    if (!this.tokens) return this.finish === "stopped" ? "stopped" : "";
    const counted = `${this.tokens} ${this.tokens === 1 ? "token" : "tokens"}`;
    if (this.finish === "stopped") return `${counted}, stopped`;
    if (this.finish === "length") return `${counted}, cut at the limit`;
    const seconds = (performance.now() - this.begun) / 1000;
    return `${counted}, ${short((this.tokens - 1) / seconds, 1)} a second`;
  }

  /** Steer the rest of this answer so. Changes that come in between are left out; the last is always sent. */
  async steer(strengths) {
    this.strengths = strengths;
    this.behind = !this.id;
    if (this.behind || this.busy) return;
    this.busy = true;
    try {
      for (let sent = this.used.at(-1); !this.done && different(sent, this.strengths); ) {
        sent = this.within(this.strengths);
        await request(`v1/steering/${encodeURIComponent(this.id)}`, { method: "POST", body: { steering: sent } });
        this.used.push(sent);
        this.changes.push(this.text.length);
        this.tell();
        await new Promise((resolve) => setTimeout(resolve, PAUSE));
      }
    } catch (error) {
      if (error.status !== 404) say(this.error, error.message); // 404: it has ended meanwhile
    } finally {
      this.busy = false;
    }
  }

  /** Of some strengths those of the concepts that this answer began with, which are all that can change. */
  within(strengths) {
    const all = Object.entries(this.used[0]).map(([concept, value]) => [concept, strengths[concept] ?? value]);
    return Object.fromEntries(all);
  }

  /** Show the strengths, as in "ocean 2.2 → 3": those that it began and ended with. */
  tell() {
    if (!Object.keys(this.used[0]).length) return this.label.replaceChildren("Unsteered");
    const [first, last] = [this.used[0], this.used.at(-1)];
    const said = [];
    for (const concept of Object.keys(first)) {
      const [from, to] = [short(first[concept], 2), short(last[concept], 2)];
      if (first[concept] || last[concept]) said.push(`${concept} ${from}${from === to ? "" : ` → ${to}`}`);
    }
    this.label.replaceChildren("Steered", element("span", {}, said.join(", ") || "off"));
  }

  /** One more button after the text. */
  offer(label, act) {
    const made = element("button", { type: "button", className: "quiet" }, label);
    made.addEventListener("click", act);
    this.made.before(made);
    return made;
  }

  async copied() {
    try {
      await navigator.clipboard.writeText(this.text);
      this.copy.textContent = "Copied";
    } catch {
      this.copy.textContent = "Not allowed";
    }
    setTimeout(() => (this.copy.textContent = "Copy"), 1500);
  }
}

/** Whether some strength is another one, of the concepts that both have. */
const different = (one, other) =>
  Object.keys(one).some((concept) => concept in other && one[concept] !== other[concept]);
