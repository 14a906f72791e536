// Recorded steps as a drawing: a row for each shard, a bar for each stage, from GET /cluster/trace.
import { drawn, element } from "./elements.js";
import { number } from "./rates.js";

const WIDTH = 1000;
const ROW = 34;
const COLORS = 8;

/** What kind of stage a name means: "attention" of "attention.3"; one colour each. */
export function kindOf(name) {
  return name.replace(/[\d.:/ ]+\d*.*$/, "") || name;
}

/** Rows and bars of an engine's steps: {shards, end, kinds, bars: [{shard, kind, name, begin, end}], steps}, in µs. */
export function layout(steps) {
  const shards = [...new Set(steps.map((step) => step.shard))].sort((a, b) => a - b);
  const bars = steps.flatMap(({ shard, step, stages }) =>
    stages.map(([name, begin, end]) => ({ shard, step, name, kind: kindOf(name), begin, end })),
  );
  const spent = new Map();
  for (const bar of bars) spent.set(bar.kind, (spent.get(bar.kind) ?? 0) + bar.end - bar.begin);
  const kinds = [...spent].sort((a, b) => b[1] - a[1]).map(([kind, time]) => ({ kind, time }));
  return { shards, bars, kinds, end: bars.reduce((latest, bar) => Math.max(latest, bar.end), 0) };
}

/** The drawing of one engine, with the share of each kind of stage in words. */
export function timeline({ name, steps }) {
  const { shards, bars, kinds, end } = layout(steps);
  const colors = new Map(kinds.map(({ kind }, index) => [kind, `stage-${Math.min(index, COLORS - 1)}`]));
  const whole = kinds.reduce((sum, each) => sum + each.time, 0);
  const legend = kinds.map(({ kind, time }) =>
    element("li", {}, element("span", { class: `swatch ${colors.get(kind)}` }), `${kind} ${number((100 * time) / whole)} %`),
  );
  const count = new Set(steps.map((step) => step.step)).size;
  const label = `${name}: ${count} steps in ${number(end / 1000)} ms on ${shards.length} shards`;
  const rows = shards.map((shard, row) => drawn("text", { x: 0, y: row * ROW + 11, class: "axis" }, `shard ${shard}`));
  const boxes = bars.map((bar) =>
    drawn(
      "rect",
      {
        x: ((WIDTH * bar.begin) / end).toFixed(2),
        y: shards.indexOf(bar.shard) * ROW + 15,
        width: Math.max((WIDTH * (bar.end - bar.begin)) / end, 0.3).toFixed(2),
        height: ROW - 18,
        class: colors.get(bar.kind),
      },
      drawn("title", {}, `${bar.name}, step ${bar.step}: ${number(bar.end - bar.begin)} µs`),
    ),
  );
  const picture = { viewBox: `0 0 ${WIDTH} ${shards.length * ROW}`, role: "img", "aria-label": label };
  return element(
    "figure",
    {},
    element("figcaption", {}, label),
    drawn("svg", picture, ...rows, ...boxes),
    element("ul", { class: "legend" }, ...legend),
  );
}
