// A model's text as paragraphs, code blocks, `code` and **bold**. Whatever else it holds is shown as it is.

import { element } from "./dom.js";

const MARK = "\uE000"; // of private use, so that no text has it
const APART = 12; // characters between two marks at least

/**
 * Show a text that grows, with marks at some places in it. Blocks that stay the same are left alone, so that a selection
 * in them survives.
 */
export function show(place, text, marked = []) {
  const blocks = blocksOf(withMarks(text, marked));
  blocks.forEach((block, index) => {
    const shown = place.children[index];
    if (shown?.source === block.kind + block.text) return;
    const made = block.kind === "code" ? code(block.text) : paragraph(block.text);
    made.source = block.kind + block.text;
    if (shown) shown.replaceWith(made);
    else place.append(made);
  });
  while (place.children.length > blocks.length) place.lastElementChild.remove();
}

function withMarks(text, marked) {
  const places = marked.filter((at, index) => index === marked.length - 1 || marked[index + 1] - at >= APART);
  const parts = [0, ...places].map((from, index) => text.slice(from, places[index]).replaceAll(MARK, ""));
  return parts.join(MARK);
}

/** Code stands between lines of ```; a block of it that has not ended yet is code already. */
function blocksOf(text) {
  const blocks = [];
  text.split(/^ {0,3}```[^\n`]*$\n?/m).forEach((part, index) => {
    if (index % 2) blocks.push({ kind: "code", text: part.replace(/\n$/, "") });
    else for (const lines of part.split(/\n\s*\n/)) if (lines.trim()) blocks.push({ kind: "text", text: lines.trim() });
  });
  return blocks;
}

const code = (text) => element("pre", {}, element("code", {}, text.replaceAll(MARK, "")));

function paragraph(text) {
  const made = element("p");
  for (const part of text.split(/(\uE000|`[^`\n\uE000]+`|\*\*[^*\n\uE000]+\*\*)/)) {
    if (part === MARK) made.append(element("i", { className: "changed", title: "The steering changed here" }));
    else if (/^`.+`$/.test(part)) made.append(element("code", {}, part.slice(1, -1)));
    else if (/^\*\*.+\*\*$/.test(part)) made.append(element("strong", {}, part.slice(2, -2)));
    else made.append(part);
  }
  return made;
}
