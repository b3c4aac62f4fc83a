// The page: a conversation, steered and unsteered side by side, and the sliders that steer it.

import { Answer } from "./answer.js";
import { AddDialog, controllers, remove, save } from "./concepts.js";
import { byId, element, say } from "./dom.js";
import { Plot, Track } from "./plot.js";
import { askForKeyWith, request } from "./server.js";
import { Sliders } from "./steering.js";

const SETTINGS = "mlx-lqr-settings";
const MOST_TOKENS = 256;
const conversation = byId("conversation");
const question = byId("question");
const turns = []; // {question, element, steered, unsteered: Answer or null}
let model = null;
let running = null; // the AbortController of the turn that is being answered

const plot = new Plot(byId("plot"));
const sliders = new Sliders(byId("sliders"), {
  onChange: () => running && turns.at(-1).steered.steer(sliders.strengths),
  menu: [
    ["Save", (controller) => inPanel(save(controller))],
    ["Delete", (controller) => inPanel(remove(controller).then((gone) => gone && refresh()))],
  ],
});
const add = new AddDialog(async (controller) => {
  await refresh();
  for (const concept of controller.concepts) sliders.recommend(concept);
});

/** Show what goes wrong with a controller above the sliders. */
async function inPanel(work) {
  say(byId("concepts-error"), null);
  await work.catch((error) => say(byId("concepts-error"), error.message));
}

async function refresh() {
  sliders.show(await controllers());
  byId("hint").textContent = sliders.concepts.length
    ? "Ask something, then move the slider of a concept: the next words change."
    : "No concept is loaded yet. Add one: fit it from your own sentences, or load a file.";
}

// Questions and answers

const messagesBefore = (turn, kind) => {
  const earlier = turns.slice(0, turns.indexOf(turn)).filter((other) => other[kind]?.text);
  return [
    ...(settings().system ? [{ role: "system", content: settings().system }] : []),
    ...earlier.flatMap((other) => [
      { role: "user", content: other.question },
      { role: "assistant", content: other[kind].text },
    ]),
    { role: "user", content: turn.question },
  ];
};

async function ask(text) {
  await loaded; // whoever is faster than the page is answered with its model and its sliders all the same
  if (running || !text.trim()) return;
  const turn = { question: text.trim(), element: element("article", { className: "turn" }) };
  turns.at(-1)?.regenerate?.remove();
  turns.push(turn);
  byId("turns").append(turn.element);
  question.value = "";
  grow();
  answer(turn);
}

/** Answer a turn's question, or answer it again: steered, and beside it unsteered where that is shown. */
async function answer(turn) {
  const track = new Track();
  const follow = () => plot.refresh();
  const answers = [new Answer("steered", { track, onToken: follow })];
  if (byId("compare").checked && sliders.concepts.length) answers.push(new Answer("unsteered"));
  [turn.steered, turn.unsteered = null] = answers;
  for (const one of answers) one.onDrawn = keepDown;
  const columns = element("div", { className: "columns" }, ...answers.map((one) => one.element));
  turn.element.replaceChildren(element("p", { className: "question" }, turn.question), columns);
  byId("empty").hidden = true;
  plot.follow(track, sliders.concepts);
  atBottom = true;
  keepDown();

  const stopping = (running = new AbortController());
  busy(true);
  const { temperature, top_p, max_tokens = MOST_TOKENS, seed = Math.floor(Math.random() * 2 ** 31) } = settings();
  const body = { model, temperature, top_p, max_tokens, seed, stream_options: { include_usage: true } };
  const written = answers.map((one) => {
    const strengths = one.kind === "steered" ? sliders.strengths : {};
    return one.write({ ...body, messages: messagesBefore(turn, one.kind) }, strengths, stopping.signal);
  });
  await Promise.all(written);
  if (running !== stopping) return; // a new chat was begun meanwhile
  running = null;
  busy(false);
  turn.regenerate = turn.steered.offer("Regenerate", () => answer(turn));
  if (track.points.length) turn.steered.offer("Plot", () => showPlot(track));
  byId("status").textContent = turn.steered.finish === "stopped" ? "Stopped." : "The answer is complete.";
  keepDown();
}

function showPlot(track) {
  byId("tracking").open = true;
  plot.follow(track, sliders.concepts);
}

function busy(answering) {
  const held = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = answering;
  byId("stop").hidden = !answering;
  if (answering) byId("status").textContent = "Answering.";
  if (held || (!answering && document.activeElement === document.body)) question.focus();
}

function newChat() {
  running?.abort();
  running = null;
  busy(false);
  turns.length = 0;
  byId("turns").replaceChildren();
  byId("empty").hidden = false;
  plot.follow(new Track(), sliders.concepts);
  question.focus();
}

// The newest words stay in sight unless the reader has scrolled up.
let atBottom = true;
conversation.addEventListener("scroll", () => {
  atBottom = conversation.scrollHeight - conversation.scrollTop - conversation.clientHeight < 40;
});
function keepDown() {
  if (atBottom) conversation.scrollTop = conversation.scrollHeight;
}
new ResizeObserver(keepDown).observe(conversation);

// The question box

function grow() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight + 2}px`; // and its border
}
question.addEventListener("input", grow);
question.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(question.value);
});
byId("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  ask(question.value);
});
byId("stop").addEventListener("click", () => running?.abort());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) running?.abort();
});
for (const example of byId("examples").children) example.addEventListener("click", () => ask(example.textContent));
byId("new-chat").addEventListener("click", newChat);
byId("open-add").addEventListener("click", () => add.open());
const compared = () => document.body.classList.toggle("alone", !byId("compare").checked);
byId("compare").addEventListener("change", compared);
compared(); // a browser may restore the switch

// Settings, kept by this browser

const form = byId("settings").querySelector("form");

/** Numbers and texts that were set; what is left empty is not there. */
function settings() {
  const set = {};
  for (const field of form.elements) {
    if (!field.name || field.value.trim() === "") continue;
    set[field.name] = field.type === "number" ? Number(field.value) : field.value.trim();
  }
  return set;
}

function readSettings() {
  try {
    const kept = JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
    for (const field of form.elements) if (field.name in kept) field.value = kept[field.name];
  } catch {
    localStorage.removeItem(SETTINGS);
  }
}

byId("open-settings").addEventListener("click", () => byId("settings").showModal());
byId("settings").addEventListener("close", () => localStorage.setItem(SETTINGS, JSON.stringify(settings())));
readSettings();

askForKeyWith(
  (line) =>
    new Promise((resolve) => {
      const dialog = byId("key");
      const field = dialog.querySelector("input");
      field.value = "";
      byId("key-note").textContent = line ?? "It is kept until this tab is closed.";
      dialog.addEventListener("cancel", (event) => event.preventDefault());
      dialog.addEventListener("close", () => resolve(field.value), { once: true });
      dialog.showModal();
    }),
);

// On a narrow screen the plot would hide the conversation.
const tracking = byId("tracking");
tracking.open = !matchMedia("(max-width: 899px)").matches;
tracking.addEventListener("toggle", () => tracking.open && tracking.scrollIntoView({ block: "nearest" }));

const loaded = inPanel(
  (async () => {
    const listed = await (await request("v1/models")).json();
    model = listed.data[0].id;
    byId("model").textContent = model;
    await refresh();
  })(),
);
