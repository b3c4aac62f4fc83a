// Building elements. Text is always set as text, never as HTML.

export const byId = (id) => document.getElementById(id);

/** An element with properties (those with a dash as attributes) and children, which are elements or strings. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role" || key === "for") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

const SVG = "http://www.w3.org/2000/svg";

/** An element of SVG with attributes and children. */
export function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** Show a line in an element that is hidden while there is none. */
export function say(place, line) {
  place.textContent = line ?? "";
  place.hidden = !line;
}

/** A number with so many digits after the point at most, and no zeros at the end: 2.229, -0.5, 12. */
export const short = (number, digits = 3) => String(Number(Number(number).toFixed(digits)));
