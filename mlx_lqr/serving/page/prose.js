// A model's text as paragraphs, code blocks, `code` and **bold**. Whatever else it holds is shown as it is.

import { element } from "./dom.js";

/** Show a text that grows: blocks that stay the same are left alone, so that a selection in them survives. */
export function show(place, text) {
  const blocks = blocksOf(text);
  blocks.forEach((block, index) => {
    const shown = place.children[index];
    if (shown?.source === block.kind + block.text) return;
    const made = block.kind === "code" ? element("pre", {}, element("code", {}, block.text)) : paragraph(block.text);
    made.source = block.kind + block.text;
    if (shown) shown.replaceWith(made);
    else place.append(made);
  });
  while (place.children.length > blocks.length) place.lastElementChild.remove();
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

function paragraph(text) {
  const made = element("p");
  for (const part of text.split(/(`[^`\n]+`|\*\*[^*\n]+\*\*)/)) {
    if (/^`.+`$/.test(part)) made.append(element("code", {}, part.slice(1, -1)));
    else if (/^\*\*.+\*\*$/.test(part)) made.append(element("strong", {}, part.slice(2, -2)));
    else made.append(part);
  }
  return made;
}
