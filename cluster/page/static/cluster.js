// The cluster at work: asked once a second while somebody looks.
import { byId, drawn, element } from "./elements.js";
import { EngineView, Figure } from "./engine_view.js";
import { number, Rates } from "./rates.js";
import { json } from "./server.js";

const VERSION = 1;
const PERIOD_MS = 1000;
const SPARK = { width: 240, height: 36 };

export class Cluster {
  constructor() {
    this.rates = new Rates();
    this.views = [];
    this.figures = {
      tokens: new Figure("tokens/s", "Generated, of all requests over HTTP"),
      prompts: new Figure("prompt tokens/s", "Asked for, of all requests over HTTP"),
      finished: new Figure("requests ended", "On this front, since its start"),
    };
    this.line = drawn("polyline", {});
    const box = { viewBox: `0 0 ${SPARK.width} ${SPARK.height}`, preserveAspectRatio: "none", class: "spark", role: "img" };
    const spark = drawn("svg", { ...box, "aria-label": "tokens a second in the last minute" }, this.line);
    const nodes = Object.values(this.figures).map((figure) => figure.node);
    byId("totals").append(element("dl", { class: "figures" }, ...nodes), spark);
  }

  /** Asks again and again; while the page is hidden it waits. */
  async run() {
    for (;;) {
      if (!document.hidden) await this.look();
      await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
    }
  }

  async look() {
    const trouble = byId("cluster-error");
    try {
      const body = await json("cluster");
      if (body.version !== VERSION) throw new Error("this page is of another version than the server: reload it");
      this.show(body, performance.now());
      trouble.hidden = true;
    } catch (error) {
      trouble.textContent = `The cluster cannot be seen: ${error.message}`;
      trouble.hidden = false;
      byId("pulse").textContent = "";
    }
  }

  show(body, now) {
    const sum = this.rates.look(body, now);
    this.figures.tokens.set(number(sum.tokens));
    this.figures.prompts.set(number(sum.prompts));
    const finished = Object.entries(body.front.finished);
    this.figures.finished.set(finished.map(([reason, count]) => `${number(count)} ${reason}`).join(", ") || "0");
    this.draw();
    while (this.views.length < body.engines.length) {
      this.views.push(new EngineView());
      byId("engines").append(this.views.at(-1).node);
    }
    while (this.views.length > body.engines.length) this.views.pop().node.remove();
    body.engines.forEach((engine, index) => this.views[index].update(engine, this.rates, now));
    byId("pulse").textContent = pulse(body.engines, sum.tokens);
    byId("no-engine").hidden = body.engines.length > 0;
  }

  draw() {
    const { history } = this.rates;
    const most = Math.max(...history, 1);
    const points = history.map((value, index) => {
      const x = SPARK.width - (history.length - 1 - index) * (SPARK.width / 59);
      return `${x.toFixed(1)},${(SPARK.height - 2 - (value / most) * (SPARK.height - 4)).toFixed(1)}`;
    });
    this.line.setAttribute("points", points.join(" "));
  }
}

/** The cluster in a few words, for the page's head. */
export function pulse(engines, tokens) {
  if (!engines.length) return "no engine";
  const ready = engines.filter((engine) => engine.state === "ready").length;
  const running = engines.reduce((sum, engine) => sum + (engine.running ?? 0), 0);
  const who = engines.length === 1 ? engines[0].state : `${ready} of ${engines.length} engines ready`;
  return `${who}, ${number(running)} running, ${number(tokens)} tokens/s`;
}
