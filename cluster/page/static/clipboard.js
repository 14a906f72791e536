// Copying. Browsers give the clipboard to pages of https and of this machine only; elsewhere the old way does it.
import { element } from "./elements.js";

/** A button that copies what `text` gives when it is pressed. */
export function copyButton(text) {
  const button = element("button", { type: "button", class: "small", onclick: copy }, "Copy");
  async function copy() {
    const done = await copied(text());
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  }
  return button;
}

async function copied(text) {
  if (navigator.clipboard) {
    return navigator.clipboard.writeText(text).then(() => true, () => false);
  }
  const area = element("textarea", { class: "hidden", readonly: true });
  area.value = text;
  document.body.append(area);
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  return done;
}
