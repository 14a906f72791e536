// Conversations, kept in the browser alone, and what is sent of one.

const KEPT = "flyray.conversations.1";
export const SETTINGS = { system: "", temperature: "", max_tokens: "", thinking: true, tools: "" };

/** All of them, the newest first. `current` is the one shown. storage: localStorage, or what has its two methods. */
export class Conversations {
  constructor(storage) {
    this.storage = storage;
    this.all = kept(storage);
    if (!this.all.length) this.create();
    this.current = this.all[0];
  }

  /** A new one with the settings of the one shown; an empty one is taken again. */
  create() {
    const empty = this.all.find((each) => !each.messages.length);
    const settings = { ...SETTINGS, ...this.current?.settings };
    this.current = empty ?? { id: identity(), settings, messages: [] };
    this.all = [this.current, ...this.all.filter((each) => each !== this.current)];
  }

  select(id) {
    this.current = this.all.find((each) => each.id === id) ?? this.current;
  }

  removeCurrent() {
    this.all = this.all.filter((each) => each !== this.current);
    if (!this.all.length) this.create();
    this.current = this.all[0];
    this.save();
  }

  /** Keeps them; throws what the storage throws when it is full. */
  save() {
    this.storage.setItem(KEPT, JSON.stringify(this.all));
  }
}

/** What the list calls it. */
export function title(conversation) {
  const first = conversation.messages.find((each) => each.role === "user");
  const text = first ? first.content.replace(/\s+/g, " ").trim() : "New conversation";
  return text.length > 40 ? `${text.slice(0, 39)}…` : text;
}

/** The body of a chat request. Throws an Error that says which setting is wrong. */
export function chatRequest(conversation, model) {
  const { system, temperature, max_tokens, thinking, tools } = conversation.settings;
  const body = { model, messages: [], thinking, stream: true, stream_options: { include_usage: true } };
  if (system.trim()) body.messages.push({ role: "system", content: system });
  body.messages.push(...conversation.messages.map(sent).filter(Boolean));
  if (temperature !== "") body.temperature = Number(temperature);
  if (max_tokens !== "") body.max_tokens = Number(max_tokens);
  if (tools.trim()) body.tools = parsedTools(tools);
  return body;
}

/** The tools' JSON. Throws an Error that says what is wrong. */
export function parsedTools(text) {
  let tools;
  try {
    tools = JSON.parse(text);
  } catch (error) {
    throw new Error(`Tools: ${error.message}`);
  }
  if (!Array.isArray(tools)) throw new Error("Tools: must be a list, as [{\"type\": \"function\", …}]");
  return tools;
}

/** A message as the server takes it; null for an answer that failed before it said anything. */
function sent(message) {
  if (message.role === "tool") return { role: "tool", tool_call_id: message.id, content: message.content };
  if (message.role === "user") return { role: "user", content: message.content };
  const calls = message.calls.filter((call) => call.id);
  if (!message.content && !calls.length) return null;
  return {
    role: "assistant",
    content: message.content,
    ...(message.reasoning ? { reasoning_content: message.reasoning } : {}),
    ...(calls.length ? { tool_calls: calls.map(sentCall) } : {}),
  };
}

function sentCall(call) {
  return { id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } };
}

/** An answer that has not begun. */
export function newAnswer() {
  return { role: "assistant", content: "", reasoning: "", calls: [], finish: "", tokens: 0, error: "" };
}

/** Adds a chunk of the stream to an answer; whether text came with it. */
export function addChunk(answer, chunk) {
  if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
  const choice = chunk.choices[0];
  if (!choice) return false;
  const delta = choice.delta;
  answer.reasoning += delta.reasoning_content ?? "";
  answer.content += delta.content ?? "";
  for (const call of delta.tool_calls ?? []) {
    const known = (answer.calls[call.index] ??= { id: "", name: "", arguments: "" });
    known.id ||= call.id ?? "";
    known.name ||= call.function?.name ?? "";
    known.arguments += call.function?.arguments ?? "";
  }
  answer.finish = choice.finish_reason ?? answer.finish;
  return Boolean(delta.reasoning_content || delta.content || delta.tool_calls);
}

/** Takes away the last answer, with calls and results that led to it; false where there is no question. */
export function toLastQuestion(messages) {
  const last = messages.findLastIndex((each) => each.role === "user");
  if (last < 0) return false;
  messages.length = last + 1;
  return true;
}

function kept(storage) {
  try {
    const found = JSON.parse(storage.getItem(KEPT) ?? "[]");
    return found.map((each) => ({ ...each, settings: { ...SETTINGS, ...each.settings } }));
  } catch {
    return []; // written by something else; it is replaced at the next save
  }
}

function identity() {
  return Array.from(crypto.getRandomValues(new Uint8Array(8)), (byte) => byte.toString(16).padStart(2, "0")).join("");
}
