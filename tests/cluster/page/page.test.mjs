// What the page computes, without a browser; run by test_page.py.
import assert from "node:assert/strict";
import { test } from "node:test";

const page = (name) => import(`../../../cluster/page/static/${name}.js`);
const { EventParser } = await page("event_parser");
const { parse, spans } = await page("markdown");
const { addChunk, chatRequest, Conversations, newAnswer, SETTINGS, title, toLastQuestion } = await page("conversations");
const { markAwaited } = await page("chat");
const { footOf } = await page("message_view");
const { Rates, percent } = await page("rates");
const { duration, kindOf, layout } = await page("timeline");
const { heat, loadsOf } = await page("heat_map");
const { pulse } = await page("cluster");

/** Storage in memory with the two methods that are used. */
function storage(content = {}) {
  return { content, getItem: (name) => content[name] ?? null, setItem: (name, value) => (content[name] = value) };
}

test("events come whole, however the text is cut", () => {
  const text = 'data: {"a":1}\n\n: a comment\r\ndata: two\r\n\r\ndata:[DONE]\n\n';
  for (let size = 1; size < text.length; size += 1) {
    const parser = new EventParser();
    const found = [];
    for (let at = 0; at < text.length; at += size) found.push(...parser.feed(text.slice(at, at + size)));
    assert.deepEqual(found, ['{"a":1}', "two", "[DONE]"]);
  }
});

test("markdown's blocks", () => {
  const text = "# Head\nline one\nline two\n\n- a\n- **b**\n3. c\n4. d\n> said\n\n```py\nx = `1`\n\n# no heading\n```\n|a|b|\n|-|:-:|\n|1|`2`|";
  const blocks = parse(text);
  assert.deepEqual(blocks.map((block) => block.kind), ["heading", "paragraph", "list", "list", "quote", "code", "table"]);
  assert.deepEqual(blocks[1].spans, [{ kind: "text", text: "line one\nline two" }]);
  assert.deepEqual(blocks[2].items[1], [{ kind: "strong", text: "b" }]);
  assert.deepEqual([blocks[3].ordered, blocks[3].start, blocks[3].items.length], [true, 3, 2]);
  assert.deepEqual([blocks[5].language, blocks[5].text], ["py", "x = `1`\n\n# no heading"]);
  assert.deepEqual(blocks[6].rows[1][1], [{ kind: "code", text: "2" }]);
});

test("markdown of an answer on its way keeps its whole text", () => {
  const text = "Say **this** and `that`:\n\n```\nlet a = 1 * 2 * 3;";
  for (let end = 0; end <= text.length; end += 1) {
    const shown = parse(text.slice(0, end)).map((block) => block.text ?? block.spans.map((span) => span.text).join(""));
    const letters = (piece) => piece.replace(/[`*\n]/g, "");
    assert.equal(letters(shown.join("")), letters(text.slice(0, end)));
  }
});

test("HTML and links are text", () => {
  const text = '<img src=x onerror=alert(1)> [a](javascript:alert(1)) <script>';
  assert.deepEqual(parse(text), [{ kind: "paragraph", spans: [{ kind: "text", text }] }]);
});

test("marks that nothing closes are text, and a text of marks alone takes no time", () => {
  assert.deepEqual(spans("2 * 3 * 4 **bold"), [{ kind: "text", text: "2 * 3 * 4 **bold" }]);
  const marks = "**a ".repeat(20_000) + "`";
  assert.equal(spans(marks).map((span) => span.text).join("").length > 20_000, true);
});

test("a conversation becomes a request", () => {
  const settings = { ...SETTINGS, system: "Be short.", temperature: "0", max_tokens: "9", tools: '[{"type":"function"}]' };
  const call = { id: "functions.f:0", name: "f", arguments: "{}" };
  const messages = [
    { role: "user", content: "Hi" },
    { ...newAnswer(), error: "the engine was lost" },
    { role: "user", content: "Again" },
    { ...newAnswer(), reasoning: "Hm.", calls: [call] },
    { role: "tool", id: call.id, content: "7" },
  ];
  const body = chatRequest({ settings, messages }, "m");
  assert.deepEqual([body.model, body.temperature, body.max_tokens, body.thinking, body.stream], ["m", 0, 9, true, true]);
  assert.deepEqual(body.messages.map((message) => message.role), ["system", "user", "user", "assistant", "tool"]);
  assert.deepEqual(body.messages[3].tool_calls, [{ id: call.id, type: "function", function: { name: "f", arguments: "{}" } }]);
  assert.equal(body.messages[3].reasoning_content, "Hm.");
  assert.deepEqual(body.messages[4], { role: "tool", tool_call_id: call.id, content: "7" });
  const plain = chatRequest({ settings: SETTINGS, messages: [] }, "m");
  assert.deepEqual(Object.keys(plain).sort(), ["messages", "model", "stream", "stream_options", "thinking"]);
  assert.throws(() => chatRequest({ settings: { ...SETTINGS, tools: "{}" }, messages: [] }, "m"), /Tools: must be a list/);
  assert.throws(() => chatRequest({ settings: { ...SETTINGS, tools: "[" }, messages: [] }, "m"), /Tools: /);
});

test("chunks become an answer", () => {
  const answer = newAnswer();
  const add = (delta, finish_reason = null) => addChunk(answer, { choices: [{ delta, finish_reason }] });
  const call = (index, part) => ({ tool_calls: [{ index, ...part }] });
  assert.equal(add({ role: "assistant", content: "" }), false);
  assert.equal(add({ reasoning_content: "Think" }), true);
  add({ content: "It " });
  add({ content: "is." });
  add(call(0, { id: "a", function: { name: "f", arguments: "{" } }));
  add(call(0, { function: { arguments: "}" } }));
  add(call(1, { id: "b", function: { name: "g", arguments: "" } }));
  add({}, "tool_calls");
  addChunk(answer, { choices: [], usage: { completion_tokens: 12 } });
  const { content, reasoning, calls, finish, tokens } = answer;
  assert.deepEqual([content, reasoning, finish, tokens], ["It is.", "Think", "tool_calls", 12]);
  assert.deepEqual(calls, [{ id: "a", name: "f", arguments: "{}" }, { id: "b", name: "g", arguments: "" }]);
});

test("conversations are kept, found again, and never none", () => {
  const kept = storage();
  const first = new Conversations(kept);
  first.current.messages.push({ role: "user", content: "One\n two" });
  first.current.settings.system = "S";
  first.create();
  assert.deepEqual([first.current.settings.system, first.all.length], ["S", 2]);
  first.create(); // an empty one is taken again
  assert.equal(first.all.length, 2);
  first.save();
  const second = new Conversations(kept);
  assert.deepEqual(second.all.map(title), ["New conversation", "One two"]);
  second.select(second.all[1].id);
  second.removeCurrent();
  second.removeCurrent();
  assert.deepEqual(new Conversations(kept).all.map(title), ["New conversation"]);
  assert.equal(new Conversations(storage({ "flyray.conversations.1": "no JSON" })).all.length, 1);
});

test("regenerating goes back to the question, calls and results included", () => {
  const messages = [{ role: "user" }, { role: "assistant" }, { role: "user" }, { role: "assistant" }, { role: "tool" }, { role: "assistant" }];
  assert.equal(toLastQuestion(messages), true);
  assert.equal(messages.length, 3);
  assert.equal(toLastQuestion([]), false);
});

test("calls wait for the results that are not given yet", () => {
  const calls = [{ id: "a" }, { id: "b" }];
  const messages = [{ role: "user" }, { ...newAnswer(), calls }, { role: "tool", id: "a" }];
  markAwaited(messages);
  assert.deepEqual(messages[1].awaits, ["b"]);
  messages.push({ role: "tool", id: "b" });
  markAwaited(messages);
  assert.equal(messages[1].awaits, undefined);
});

test("an answer's foot", () => {
  assert.equal(footOf({ tokens: 11, firstMs: 52.4, seconds: 2, finish: "length" }, false), "11 tokens, first after 52 ms, 5 tokens/s, cut off at the limit of tokens");
  assert.equal(footOf({ tokens: 0, finish: "stopped" }, false), "stopped");
});

test("rates are summed over fronts by their own clocks", () => {
  const rates = new Rates();
  const body = (name, seconds, tokens) => ({ front: { name, seconds, generated_tokens: tokens, prompt_tokens: 0 } });
  assert.equal(rates.look(body("a", 10, 100), 0).tokens, 0);
  assert.equal(rates.look(body("a", 12, 300), 1000).tokens, 100);
  rates.look(body("b", 5, 0), 2000);
  assert.equal(rates.look(body("b", 6, 50), 3000).tokens, 150);
  assert.equal(rates.look(body("b", 7, 100), 30_000).tokens, 50); // front a was not heard of for long
  assert.equal(rates.look(body("b", 1, 0), 31_000).tokens, 0); // begun anew
  const engine = (steps) => ({ name: "e", steps });
  assert.deepEqual([rates.steps(engine(10), 0), rates.steps(engine(30), 500), rates.steps(engine(3), 900)], [0, 40, 0]);
  assert.deepEqual([percent(1, 5), percent(1, 30), percent(0, 0)], ["20 %", "3.3 %", "–"]);
});

test("recorded steps become bars", () => {
  const steps = [
    { step: 4, shard: 1, stages: [["attention.1", 0, 30], ["experts.1", 30, 100]] },
    { step: 4, shard: 0, stages: [["attention.1", 0, 40]] },
    { step: 5, shard: 0, stages: [] },
  ];
  const { shards, bars, kinds } = layout(steps);
  assert.deepEqual(shards, [0, 1]);
  assert.deepEqual(kinds, [{ kind: "attention", time: 70 }, { kind: "experts", time: 70 }]);
  assert.deepEqual([bars.length, duration(bars), duration([])], [3, 100, 0]);
  assert.deepEqual(["embed", "dispatch.12", "experts.3"].map(kindOf), ["embed", "dispatch", "experts"]);
});

test("expert load from its bytes", () => {
  const loads = btoa(String.fromCharCode(0, 32, 64, 255));
  assert.deepEqual(loadsOf({ layers: [1, 2], loads }), { layers: [1, 2], experts: 2, loads: [0, 1, 2, 255 / 32] });
  assert.equal(loadsOf({ layers: [], loads: "" }), null);
  assert.equal(loadsOf({ layers: [1], loads: btoa("\0\0") }), null);
  assert.deepEqual([heat(0), heat(1), heat(8)], [0, 0.5, 1]);
});

test("the cluster in a few words", () => {
  const ready = { state: "ready", running: 3 };
  assert.equal(pulse([ready], 12), "ready, 3 running, 12 tokens/s");
  assert.equal(pulse([], 0), "no engine");
  assert.equal(pulse([ready, { state: "unavailable" }], 0), "1 of 2 engines ready, 3 running, 0 tokens/s");
});
