// A message's node, and its change while the answer comes: only the blocks that differ are made anew.
import { copyButton } from "./clipboard.js";
import { element } from "./elements.js";
import { parse, render } from "./markdown.js";

const WHO = { user: "You", assistant: "Model", tool: "Result of the call" };

/** The view of one message; `update` shows what it is now. onResult: takes a call's id and the result typed for it. */
export class MessageView {
  constructor(message, { onResult }) {
    this.message = message;
    this.onResult = onResult;
    this.shown = [];
    this.thought = element("pre", { class: "thought", tabindex: "0" });
    this.summary = element("summary");
    this.thinking = element("details", { class: "thinking", hidden: true }, this.summary, this.thought);
    this.body = element("div", { class: "body" });
    this.calls = element("div", { class: "calls" });
    this.error = element("p", { class: "error", role: "alert" });
    this.foot = element("p", { class: "faint foot" });
    const copy = message.role === "tool" ? null : copyButton(() => message.content);
    const head = element("div", { class: "head" }, element("h3", {}, WHO[message.role]), copy);
    const parts = [head, this.thinking, this.body, this.calls, this.error, this.foot];
    this.node = element("article", { class: `message ${message.role}` }, ...parts);
    this.update(false);
  }

  /** running: whether more of it will come. */
  update(running) {
    const { role, content, reasoning, error } = this.message;
    if (role === "assistant") this.updateBlocks(parse(content));
    else this.body.textContent = content;
    this.thinking.hidden = !reasoning;
    if (reasoning && this.thought.textContent !== reasoning) this.thought.textContent = reasoning;
    const thinks = running && !content && !this.message.calls.length;
    this.summary.textContent = thinks ? "Thinking…" : `Thought (${reasoning?.length ?? 0} characters)`;
    this.error.textContent = error ?? "";
    this.foot.textContent = role === "assistant" ? footOf(this.message, running) : "";
    this.node.setAttribute("aria-busy", String(running));
    if (role === "assistant") this.updateCalls(running);
  }

  updateBlocks(blocks) {
    const written = blocks.map((block) => JSON.stringify(block));
    let same = 0;
    while (same < written.length && written[same] === this.shown[same]) same += 1;
    while (this.body.childElementCount > same) this.body.lastElementChild.remove();
    this.body.append(...render(blocks.slice(same), (text) => copyButton(() => text)));
    this.shown = written;
  }

  updateCalls(running) {
    if (this.calls.contains(document.activeElement)) return; // somebody types a result
    this.calls.replaceChildren(...this.message.calls.map((call) => this.callNode(call, running)));
  }

  callNode(call, running) {
    const answered = running || !this.message.awaits?.includes(call.id);
    return element(
      "div",
      { class: "call" },
      element("p", {}, "calls ", element("code", {}, call.name)),
      element("pre", { tabindex: "0" }, pretty(call.arguments)),
      answered ? null : this.resultForm(call),
    );
  }

  resultForm(call) {
    const input = element("textarea", { rows: "2", required: true, placeholder: "What the tool gave" });
    const send = (event) => {
      event.preventDefault();
      this.onResult(call.id, input.value);
    };
    const label = element("label", {}, `Result of ${call.name}`, input);
    return element("form", { onsubmit: send }, label, element("button", { type: "submit" }, "Give it to the model"));
  }
}

/** Tokens and times of an answer, in words. */
export function footOf({ tokens, firstMs, seconds, finish, error }, running) {
  if (running) return firstMs ? "" : "waiting for the first token…";
  const parts = [];
  if (tokens) parts.push(`${tokens} tokens`);
  if (firstMs) parts.push(`first after ${Math.round(firstMs)} ms`);
  if (tokens > 1 && seconds > 0) parts.push(`${Math.round((tokens - 1) / seconds)} tokens/s`);
  if (finish === "length") parts.push("cut off at the limit of tokens");
  if (finish === "stopped" && !error) parts.push("stopped");
  return parts.join(", ");
}

function pretty(json) {
  try {
    return JSON.stringify(JSON.parse(json), null, 2);
  } catch {
    return json; // on its way, or no JSON: shown as it is
  }
}
