// Fit a concept from sentences; load, save and delete controllers.

import { byId, element, say } from "./dom.js";
import { events, request } from "./server.js";

const CONTROLLERS = "v1/controllers";
const pathOf = (id) => `${CONTROLLERS}/${encodeURIComponent(id)}`;

export async function controllers() {
  return (await (await request(CONTROLLERS)).json()).data;
}

/** Hand the file of a controller to the browser, which saves it. */
export async function save({ id }) {
  const content = await (await request(`${pathOf(id)}/file`)).blob();
  const link = element("a", { href: URL.createObjectURL(content), download: `${id}.safetensors` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** Delete a controller if the person says so; whether it was. */
export function remove({ id }) {
  const dialog = byId("confirm");
  byId("confirm-question").textContent = `Delete ${id}?`;
  dialog.returnValue = "keep";
  dialog.showModal();
  return new Promise((resolve, reject) => {
    const decided = async () => {
      if (dialog.returnValue !== "delete") return resolve(false);
      await request(pathOf(id), { method: "DELETE" });
      resolve(true);
    };
    dialog.addEventListener("close", () => decided().catch(reject), { once: true });
  });
}

const sentences = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

/** The dialog that fits a concept or loads a file. onAdded is called with each new controller. */
export class AddDialog {
  constructor(onAdded) {
    this.dialog = byId("add");
    this.form = byId("fit");
    this.onAdded = onAdded;
    this.underWay = null;
    for (const name of ["positive", "negative"]) this.form.elements[name].addEventListener("input", () => this.count());
    this.form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.fit();
    });
    byId("fit-close").addEventListener("click", () => this.dialog.close());
    this.dialog.addEventListener("close", () => this.underWay?.abort());
    byId("load").addEventListener("change", (event) => this.load(event.target));
  }

  open() {
    this.state("input");
    this.count();
    this.dialog.showModal();
    this.form.elements.name.focus();
  }

  /** What the dialog is at: "input", "fitting" or "done". */
  state(state) {
    byId("fit-input").hidden = state !== "input";
    byId("fit-progress").hidden = state !== "fitting";
    byId("fit-result").hidden = state !== "done";
    byId("fit-start").hidden = state !== "input";
    byId("load-label").hidden = state !== "input";
    byId("fit-close").textContent = state === "done" ? "Close" : "Cancel";
    say(byId("fit-error"), null);
  }

  count() {
    for (const name of ["positive", "negative"]) {
      byId(`${name}-count`).textContent = sentences(this.form.elements[name].value).length || "";
    }
  }

  async fit() {
    const { name, positive, negative } = this.form.elements;
    const sets = { positive: sentences(positive.value), negative: sentences(negative.value) };
    const body = { name: name.value, ...sets, stream: true };
    this.state("fitting");
    byId("fit-stage").textContent = "Starting";
    byId("fit-bar").removeAttribute("value");
    byId("fit-close").focus();
    await this.adding(async (signal) => {
      for await (const event of events(CONTROLLERS, body, signal)) {
        if (event.object === "controller") return event;
        byId("fit-stage").textContent = `${event.stage}: ${event.done} of ${event.total}`;
        byId("fit-bar").max = event.total;
        byId("fit-bar").value = event.done;
      }
      throw new Error("The server sent no controller.");
    });
  }

  async load(input) {
    const [file] = input.files;
    input.value = "";
    if (!file) return;
    const id = file.name.replace(/\.safetensors$/i, "").replace(/[^A-Za-z0-9_-]+/g, "-");
    await this.adding(async (signal) => {
      const response = await request(`${pathOf(id)}/file`, { method: "PUT", body: file, signal });
      return response.json();
    });
  }

  /** Add the controller that `work` promises, and say what came of it. */
  async adding(work) {
    this.underWay = new AbortController();
    try {
      const controller = await work(this.underWay.signal);
      this.state("done");
      this.tell(controller);
      byId("fit-close").focus();
      await this.onAdded(controller);
      this.form.reset();
    } catch (error) {
      this.state("input");
      if (error.name !== "AbortError") say(byId("fit-error"), error.message);
    } finally {
      this.underWay = null;
    }
  }

  tell({ id, layers, notes = [] }) {
    const where = `${layers.length > 1 ? "layers" : "layer"} ${layers.join(", ")}`;
    const ready = ` is ready, at ${where}. Its slider is set to the recommended strength.`;
    byId("fit-result").replaceChildren(element("p", {}, element("strong", {}, id), ready));
    if (!notes.length) return;
    const lines = notes.map((note) => element("li", {}, note));
    byId("fit-result").append(
      element("p", { className: "note" }, "Notes of the fit:"),
      element("ul", { className: "note" }, ...lines),
    );
  }
}
