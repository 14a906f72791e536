// Rates out of counters, from one look at the cluster to the next.

const FORGOTTEN_MS = 15_000;
const KEPT = 60;

/** Looks at GET /cluster's answers one after another. */
export class Rates {
  constructor() {
    this.fronts = new Map();
    this.engines = new Map();
    this.history = []; // tokens a second, the last KEPT looks
  }

  /** body: an answer; now: milliseconds of the browser's clock. Gives {tokens, prompts}, a second, over all fronts. */
  look(body, now) {
    const { name, seconds, generated_tokens: tokens, prompt_tokens: prompts } = body.front;
    const last = this.fronts.get(name);
    const since = last ? seconds - last.seconds : 0;
    const rates = since > 0 ? { tokens: (tokens - last.tokenCount) / since, prompts: (prompts - last.promptCount) / since } : {};
    this.fronts.set(name, { tokens: 0, prompts: 0, ...rates, seconds, tokenCount: tokens, promptCount: prompts, now });
    for (const [each, front] of this.fronts) if (now - front.now > FORGOTTEN_MS) this.fronts.delete(each);
    const sum = { tokens: 0, prompts: 0 };
    for (const front of this.fronts.values()) {
      sum.tokens += front.tokens;
      sum.prompts += front.prompts;
    }
    this.history = [...this.history, sum.tokens].slice(-KEPT);
    return sum;
  }

  /** Steps a second of an engine of the answer; 0 at its first look or when it began anew. */
  steps(engine, now) {
    const last = this.engines.get(engine.name);
    this.engines.set(engine.name, { steps: engine.steps, now });
    if (!last || now <= last.now || engine.steps < last.steps) return 0;
    return (1000 * (engine.steps - last.steps)) / (now - last.now);
  }
}

/** 1234 -> "1,234"; below 10 with one digit after the point. */
export function number(value) {
  return value.toLocaleString("en", { maximumFractionDigits: value && Math.abs(value) < 10 ? 1 : 0 });
}

/** Part of a whole as "12 %"; "–" of nothing. */
export function percent(part, whole) {
  return whole ? `${number((100 * part) / whole)} %` : "–";
}
