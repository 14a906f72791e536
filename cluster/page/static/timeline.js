// Recorded steps as a drawing: a row for each shard, a bar for each stage, from GET /cluster/trace.
import { drawn, element } from "./elements.js";
import { number, percent } from "./rates.js";

const WIDTH = 1000;
const COLORS = 8;

/** What kind of stage a name means: "attention" of "attention.3"; one colour each. */
export function kindOf(name) {
  return name.replace(/[\d.:/ ]+\d*.*$/, "") || name;
}

/** Rows and bars of an engine's steps: {shards, kinds: [{kind, time}], bars: [{shard, step, kind, name, begin, end}]}, in µs. */
export function layout(steps) {
  const bars = steps.flatMap(({ shard, step, stages }) =>
    stages.map(([name, begin, end]) => ({ shard, step, name, kind: kindOf(name), begin, end })),
  );
  const shards = [...new Set(bars.map((bar) => bar.shard))].sort((a, b) => a - b);
  const spent = new Map();
  for (const bar of bars) spent.set(bar.kind, (spent.get(bar.kind) ?? 0) + bar.end - bar.begin);
  const kinds = [...spent].sort((a, b) => b[1] - a[1]).map(([kind, time]) => ({ kind, time }));
  return { shards, bars, kinds };
}

/** How long bars take on the shard where they take longest: clocks of two shards tell nothing of each other. */
export function duration(bars) {
  const spans = new Map();
  for (const { shard, begin, end } of bars) {
    const [first, last] = spans.get(shard) ?? [begin, end];
    spans.set(shard, [Math.min(first, begin), Math.max(last, end)]);
  }
  return Math.max(0, ...[...spans.values()].map(([first, last]) => last - first));
}

/** The drawings of one engine: all steps, the last one larger, and the share of each kind of stage in words. */
export function timeline({ name, steps }) {
  const { shards, bars, kinds } = layout(steps);
  const colors = new Map(kinds.map(({ kind }, index) => [kind, `stage-${Math.min(index, COLORS - 1)}`]));
  const whole = kinds.reduce((sum, each) => sum + each.time, 0);
  const legend = kinds.map(({ kind, time }) =>
    element("li", {}, element("span", { class: `swatch ${colors.get(kind)}` }), `${kind} ${percent(time, whole)}`),
  );
  const numbers = [...new Set(bars.map((bar) => bar.step))];
  const label = `${name}: ${numbers.length} steps in ${number(duration(bars) / 1000)} ms`;
  const rows = (chosen) => shards.flatMap((shard) => [
    element("p", { class: "faint" }, `shard ${shard}`),
    row(chosen.filter((bar) => bar.shard === shard), colors, `shard ${shard}`),
  ]);
  const last = bars.filter((bar) => bar.step === numbers.at(-1));
  const took = `the last of them, ${number(duration(last) / 1000)} ms`;
  return element(
    "figure",
    {},
    element("figcaption", {}, label),
    ...rows(bars),
    element("figcaption", {}, took),
    ...rows(last),
    element("ul", { class: "legend" }, ...legend),
  );
}

/** One shard's bars, as wide as what they last from the first to the last. */
function row(bars, colors, label) {
  const begin = Math.min(...bars.map((bar) => bar.begin));
  const scale = WIDTH / Math.max(...bars.map((bar) => bar.end - begin));
  const boxes = bars.map((bar) =>
    drawn(
      "rect",
      {
        x: (scale * (bar.begin - begin)).toFixed(2),
        y: 0,
        width: Math.max(scale * (bar.end - bar.begin), 0.3).toFixed(2),
        height: 1,
        class: colors.get(bar.kind),
      },
      drawn("title", {}, `${bar.name}, step ${bar.step}: ${number(bar.end - bar.begin)} µs`),
    ),
  );
  const picture = { viewBox: `0 0 ${WIDTH} 1`, preserveAspectRatio: "none", role: "img", "aria-label": label };
  return drawn("svg", picture, ...boxes);
}
