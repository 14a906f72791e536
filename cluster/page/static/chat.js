// The chat: conversations, settings, one answer at a time.
import { addChunk, chatRequest, Conversations, newAnswer, parsedTools, title, toLastQuestion } from "./conversations.js";
import { byId, element } from "./elements.js";
import { MessageView } from "./message_view.js";
import { json, stream } from "./server.js";

/** Ties the chat's part of the page together. */
export class Chat {
  constructor() {
    this.conversations = new Conversations(localStorage);
    this.running = null; // the AbortController of the answer that comes
    this.model = "";
    this.list = byId("messages");
    this.prompt = byId("prompt");
    this.regenerate = element("button", { type: "button", class: "small", onclick: () => this.again() }, "Regenerate");
    this.listen();
    this.showAll();
  }

  /** Asks which model there is. */
  async start() {
    try {
      await this.findModel(false);
    } catch (error) {
      byId("model").textContent = error.message;
    }
  }

  async findModel(insist) {
    this.model = (await json("v1/models", insist)).data[0].id;
    byId("model").textContent = this.model;
  }

  listen() {
    const change = (name, work) => byId(name).addEventListener("click", () => this.idle() && work());
    change("new-conversation", () => this.open(() => this.conversations.create()));
    change("delete-conversation", () => this.open(() => this.conversations.removeCurrent()));
    byId("conversation").addEventListener("change", (event) => {
      if (this.idle()) this.open(() => this.conversations.select(event.target.value));
    });
    byId("toggle-settings").addEventListener("click", () => this.toggleSettings());
    byId("settings").addEventListener("input", () => this.readSettings());
    byId("settings").addEventListener("submit", (event) => event.preventDefault());
    byId("stop").addEventListener("click", () => this.running?.abort());
    byId("compose").addEventListener("submit", (event) => {
      event.preventDefault();
      this.ask();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.ask();
      }
    });
  }

  idle() {
    return !this.running;
  }

  open(change) {
    change();
    this.showAll();
    this.prompt.focus();
  }

  toggleSettings() {
    const settings = byId("settings");
    settings.hidden = !settings.hidden;
    byId("toggle-settings").setAttribute("aria-expanded", String(!settings.hidden));
  }

  readSettings() {
    const form = byId("settings");
    const settings = this.conversations.current.settings;
    for (const name of ["system", "temperature", "max_tokens", "tools"]) settings[name] = form.elements[name].value;
    settings.thinking = form.elements.thinking.checked;
    byId("settings-error").textContent = settingsError(settings);
    this.save();
  }

  showAll() {
    const { current, all } = this.conversations;
    const options = all.map((each) => element("option", { value: each.id, selected: each === current }, title(each)));
    byId("conversation").replaceChildren(...options);
    const form = byId("settings");
    for (const name of ["system", "temperature", "max_tokens", "tools"]) form.elements[name].value = current.settings[name];
    form.elements.thinking.checked = current.settings.thinking;
    byId("settings-error").textContent = settingsError(current.settings);
    markAwaited(current.messages);
    this.list.replaceChildren();
    if (!current.messages.length) {
      this.list.append(element("p", { class: "faint hint" }, "Ask something. Conversations stay in this browser."));
    }
    for (const message of current.messages) this.append(message);
    this.offerRegenerate();
    this.toEnd();
  }

  append(message) {
    const view = new MessageView(message, { onResult: (id, text) => this.giveResult(id, text) });
    this.list.append(view.node);
    return view;
  }

  offerRegenerate() {
    this.regenerate.remove();
    const last = this.conversations.current.messages.at(-1);
    if (last?.role === "assistant" && this.idle()) this.list.append(this.regenerate);
  }

  ask() {
    const content = this.prompt.value;
    if (!content.trim() || !this.idle()) return;
    this.prompt.value = "";
    this.conversations.current.messages.push({ role: "user", content });
    this.answer();
  }

  again() {
    if (this.idle() && toLastQuestion(this.conversations.current.messages)) this.answer();
  }

  giveResult(id, content) {
    if (!this.idle()) return;
    const { messages } = this.conversations.current;
    messages.push({ role: "tool", id, content });
    markAwaited(messages);
    if (messages.some((each) => each.awaits?.length)) this.showAll();
    else this.answer();
  }

  /** Asks for the answer to what stands there, and shows it as it comes. */
  async answer() {
    const conversation = this.conversations.current;
    const answer = newAnswer();
    this.running = new AbortController();
    this.showAll();
    conversation.messages.push(answer);
    const view = this.append(answer);
    this.setRunning(true);
    const draw = drawing(() => {
      const atEnd = this.isAtEnd();
      view.update(this.running !== null);
      if (atEnd) this.toEnd();
    });
    draw();
    this.toEnd();
    const asked = performance.now();
    let last = asked;
    try {
      if (!this.model) await this.findModel(true);
      const body = chatRequest({ ...conversation, messages: conversation.messages.slice(0, -1) }, this.model);
      for await (const chunk of stream("v1/chat/completions", body, this.running.signal)) {
        if (addChunk(answer, chunk)) {
          last = performance.now();
          answer.firstMs ??= last - asked;
        }
        draw();
      }
    } catch (error) {
      answer.finish = "stopped";
      if (error.name !== "AbortError") answer.error = error.message;
    }
    answer.seconds = (last - asked - (answer.firstMs ?? 0)) / 1000;
    this.running = null;
    this.setRunning(false);
    this.save();
    this.showAll();
  }

  setRunning(running) {
    byId("stop").hidden = !running;
    byId("send").hidden = running;
    for (const name of ["new-conversation", "delete-conversation", "conversation"]) byId(name).disabled = running;
  }

  save() {
    try {
      this.conversations.save();
    } catch (error) {
      byId("settings-error").textContent = `Not kept in this browser: ${error.message}`;
      byId("settings").hidden = false;
    }
  }

  isAtEnd() {
    return this.list.scrollHeight - this.list.scrollTop - this.list.clientHeight < 40;
  }

  toEnd() {
    this.list.scrollTop = this.list.scrollHeight;
  }
}

/** Marks on the last answer which calls have no result yet; `awaits` of every other message goes. */
export function markAwaited(messages) {
  for (const message of messages) delete message.awaits;
  const at = messages.findLastIndex((each) => each.role === "assistant");
  const rest = messages.slice(at + 1);
  if (at < 0 || rest.some((each) => each.role === "user")) return;
  const given = new Set(rest.map((each) => each.id));
  const open = messages[at].calls.filter((call) => call.id && !given.has(call.id));
  if (open.length) messages[at].awaits = open.map((call) => call.id);
}

/** `draw`, at most once a frame. */
function drawing(draw) {
  let due = false;
  return () => {
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      draw();
    });
  };
}

function settingsError({ tools }) {
  if (!tools.trim()) return "";
  try {
    parsedTools(tools);
    return "";
  } catch (error) {
    return error.message;
  }
}
