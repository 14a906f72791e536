// One engine's card: its figures, its pages, its experts, its precision plan.
import { element } from "./elements.js";
import { HeatMap } from "./heat_map.js";
import { number, percent } from "./rates.js";
import { json } from "./server.js";
import { timeline } from "./timeline.js";

/** A figure with its name; `set` changes what it says. */
export class Figure {
  constructor(name, hint = "") {
    this.value = element("dd", {}, "–");
    this.node = element("div", { class: "figure", title: hint || null }, element("dt", {}, name), this.value);
  }

  set(text) {
    if (this.value.textContent !== text) this.value.textContent = text;
  }
}

export class EngineView {
  constructor() {
    this.title = element("h2");
    this.state = element("span", { class: "state" });
    this.error = element("p", { class: "error", role: "alert" });
    this.figures = {
      running: new Figure("running", "Requests in the batch"),
      waiting: new Figure("waiting", "Requests that wait to be admitted"),
      steps: new Figure("steps/s"),
      shards: new Figure("shards"),
      cache: new Figure("from prefix cache", "Prompt tokens that were found there, since the start"),
      preemptions: new Figure("preemptions", "Requests that gave their pages back, since the start"),
      context: new Figure("context", "Most tokens of a prompt and its answer"),
      recoveries: new Figure("recoveries", "Times that lost shards came back, since the start"),
      dropped: new Figure("messages dropped", "Of other epochs or no meaning"),
    };
    this.used = element("span", { class: "used" });
    this.pages = element("p", { class: "faint" });
    this.meter = element("div", { class: "meter", role: "img" }, this.used);
    this.heat = new HeatMap();
    this.record = element("button", { type: "button", class: "small", onclick: () => this.trace() }, "Record 8 steps");
    this.traced = element("p", { class: "faint", role: "status" }, "Where a step's time goes, stage by stage, on each shard.");
    this.timeline = element("div", { class: "timeline" });
    this.plan = element("pre", { tabindex: "0" });
    const figures = Object.values(this.figures).map((figure) => figure.node);
    this.details = element(
      "div",
      {},
      element("dl", { class: "figures" }, ...figures),
      element("h3", {}, "KV pages"),
      this.meter,
      this.pages,
      this.heat.node,
      element("div", { class: "bar" }, element("h3", {}, "Steps"), this.record),
      this.traced,
      this.timeline,
      element("details", {}, element("summary", {}, "Precision plan"), this.plan),
    );
    this.node = element("section", { class: "card" }, element("div", { class: "bar" }, this.title, this.state));
    this.node.append(this.error, this.details);
  }

  async trace() {
    this.record.disabled = true;
    this.traced.textContent = "Waiting for steps…";
    try {
      const trace = await json(`cluster/trace?engine=${encodeURIComponent(this.name)}`, true);
      this.timeline.replaceChildren(timeline(trace));
      this.traced.textContent = "";
    } catch (error) {
      this.traced.textContent = error.message;
    }
    this.record.disabled = false;
  }

  /** engine: one of GET /cluster's. rates: steps a second come from it. */
  update(engine, rates, now) {
    this.name = engine.name;
    this.title.textContent = engine.name;
    this.state.textContent = engine.state;
    this.state.className = `state ${engine.state}`;
    this.error.textContent = engine.error;
    this.details.hidden = engine.pages === undefined;
    if (this.details.hidden) return;
    const { total, free, cached } = engine.pages;
    this.figures.running.set(number(engine.running));
    this.figures.waiting.set(number(engine.waiting));
    this.figures.steps.set(number(rates.steps(engine, now)));
    this.figures.shards.set(number(engine.shards));
    this.figures.cache.set(percent(engine.cached_tokens, engine.prompt_tokens));
    this.figures.preemptions.set(number(engine.preemptions));
    this.figures.context.set(number(engine.context_length));
    this.figures.recoveries.set(number(engine.recoveries));
    this.figures.dropped.set(number(engine.dropped_messages));
    const used = total - free;
    const words = `${number(used)} of ${number(total)} in use (${percent(used, total)}); ${number(cached)} known to the prefix cache`;
    this.pages.textContent = words;
    this.meter.setAttribute("aria-label", words);
    this.used.style.width = `${(100 * used) / total}%`;
    this.heat.update(engine.experts);
    this.plan.textContent = engine.precision_plan.join("\n");
  }
}
