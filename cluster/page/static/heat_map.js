// Expert load as a picture: a row for each layer, a column for each expert, from the `experts` of GET /cluster.
import { element } from "./elements.js";
import { number } from "./rates.js";

const EVEN = 32;

/** {layers, experts, loads}: loads as shares of an even one, 1 = even, row by row; null where nothing is known. */
export function loadsOf({ layers, loads }) {
  const bytes = Uint8Array.from(atob(loads), (each) => each.charCodeAt(0));
  if (!layers.length || !bytes.some(Boolean)) return null;
  return { layers, experts: bytes.length / layers.length, loads: Array.from(bytes, (byte) => byte / EVEN) };
}

/** How hot: 0 for none, 0.5 for even, towards 1 for eight times that. */
export function heat(load) {
  return load <= 1 ? load / 2 : 0.5 + Math.min(Math.log2(load) / 6, 0.5);
}

/** Draws into one canvas again and again; a pointer on it names the expert. */
export class HeatMap {
  constructor() {
    this.canvas = element("canvas", { role: "img" });
    this.under = element("p", { class: "faint" });
    const scale = element("p", { class: "scale" }, "none", element("span", { class: "ramp" }), "8 × an even share");
    this.node = element("figure", { hidden: true }, element("figcaption", {}, "Expert load"), this.canvas, this.under, scale);
    this.known = null;
    this.canvas.addEventListener("pointermove", (event) => this.point(event));
    this.canvas.addEventListener("pointerleave", () => this.say());
  }

  update(experts) {
    this.known = loadsOf(experts);
    this.experts = experts;
    this.node.hidden = !this.known;
    if (!this.known) return;
    const { layers, experts: columns, loads } = this.known;
    this.canvas.width = columns;
    this.canvas.height = layers.length;
    const context = this.canvas.getContext("2d");
    const image = context.createImageData(columns, layers.length);
    loads.forEach((load, index) => image.data.set(color(heat(load)), 4 * index));
    context.putImageData(image, 0, 0);
    const label = `Expert load of ${layers.length} layers and ${columns} experts; ${this.words()}`;
    this.canvas.setAttribute("aria-label", label);
    this.say();
  }

  point(event) {
    const { layers, experts: columns, loads } = this.known;
    const box = this.canvas.getBoundingClientRect();
    const row = Math.min(Math.floor(((event.clientY - box.top) / box.height) * layers.length), layers.length - 1);
    const column = Math.min(Math.floor(((event.clientX - box.left) / box.width) * columns), columns - 1);
    const load = loads[row * columns + column];
    this.under.textContent = `layer ${layers[row]}, expert ${column}: ${number(load)} × an even share`;
  }

  say() {
    this.under.textContent = `A row a layer, a column an expert; ${this.words()}`;
  }

  words() {
    const { imbalance, moved } = this.experts;
    const uneven = `the busiest shard has ${imbalance.toFixed(2)} × the mean`;
    return moved ? `${uneven}; ${number(moved)} slots got another expert` : uneven;
  }
}

/** Red, green, blue, alpha of a heat: dark blue, through orange, to pale yellow, rising in lightness all the way. */
function color(value) {
  const stops = [[20, 30, 60], [90, 40, 110], [200, 70, 50], [245, 160, 50], [255, 240, 180]];
  const at = Math.min(value, 0.9999) * (stops.length - 1);
  const [low, high] = [stops[Math.floor(at)], stops[Math.floor(at) + 1]];
  return [...low.map((each, index) => each + (high[index] - each) * (at % 1)), 255];
}
