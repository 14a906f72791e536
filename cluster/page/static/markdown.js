// A little of Markdown, as models write it: fences, headings, lists, quotes, tables, `code`, **strong**, *emphasis*.
// Links and HTML stay the text that they are. `parse` makes plain objects in one pass; `render` makes nodes of them.
import { element } from "./elements.js";

/** Blocks of a text: {kind, ...}; `text` of a code block, `spans` of a paragraph or heading, `items` or `rows`. */
export function parse(text) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    const fence = /^\s*(```+|~~~+)\s*([\w+#.-]*)/.exec(line);
    const heading = /^(#{1,6})\s+(.*)$/.exec(line);
    if (!line.trim()) {
      at += 1;
    } else if (fence) {
      const end = closing(lines, at + 1, fence[1]);
      blocks.push({ kind: "code", language: fence[2], text: lines.slice(at + 1, end).join("\n") });
      at = end + 1;
    } else if (heading) {
      blocks.push({ kind: "heading", level: heading[1].length, spans: spans(heading[2]) });
      at += 1;
    } else if (isRow(line) && isRule(lines[at + 1])) {
      const end = whileTrue(lines, at + 2, isRow);
      const rows = [line, ...lines.slice(at + 2, end)].map((row) => cells(row).map(spans));
      blocks.push({ kind: "table", rows });
      at = end;
    } else if (/^\s*>/.test(line)) {
      const end = whileTrue(lines, at, (each) => /^\s*>/.test(each));
      const quoted = lines.slice(at, end).map((each) => each.replace(/^\s*> ?/, ""));
      blocks.push({ kind: "quote", spans: spans(quoted.join("\n")) });
      at = end;
    } else if (marker(line)) {
      const ordered = marker(line).ordered;
      const end = whileTrue(lines, at, (each) => marker(each)?.ordered === ordered);
      const items = lines.slice(at, end).map((each) => spans(marker(each).text));
      blocks.push({ kind: "list", ordered, start: marker(line).start, items });
      at = end;
    } else {
      const end = whileTrue(lines, at + 1, (each) => each.trim() && !begins(each));
      blocks.push({ kind: "paragraph", spans: spans(lines.slice(at, end).join("\n")) });
      at = end;
    }
  }
  return blocks;
}

/** A line's parts: {kind: "text" | "code" | "strong" | "emphasis", text}. Marks that nothing closes are text. */
export function spans(text) {
  const found = [];
  const missing = new Set(); // marks that have no further end, so that a text of marks alone takes one pass
  let plain = "";
  let at = 0;
  while (at < text.length) {
    const mark = ["`", "**", "*"].find((each) => text.startsWith(each, at));
    const begin = at + (mark?.length ?? 0);
    const end = mark && !missing.has(mark) ? text.indexOf(mark, begin) : -1;
    if (mark && end < 0) missing.add(mark);
    if (end > begin && (mark === "`" || (text[begin].trim() && text[end - 1].trim()))) {
      if (plain) found.push({ kind: "text", text: plain });
      plain = "";
      found.push({ kind: { "`": "code", "**": "strong", "*": "emphasis" }[mark], text: text.slice(begin, end) });
      at = end + mark.length;
    } else {
      plain += text.slice(at, mark ? begin : at + 1);
      at = mark ? begin : at + 1;
    }
  }
  if (plain) found.push({ kind: "text", text: plain });
  return found;
}

/** Nodes of `parse`'s blocks. codeTools: makes what stands above a code block, of its text. */
export function render(blocks, codeTools) {
  return blocks.map((block) => renderBlock(block, codeTools));
}

function renderBlock(block, codeTools) {
  if (block.kind === "code") {
    const head = element("div", { class: "code-head" }, block.language || "text", codeTools(block.text));
    return element("div", { class: "code" }, head, element("pre", { tabindex: "0" }, element("code", {}, block.text)));
  }
  if (block.kind === "heading") return element(`h${Math.min(block.level + 2, 6)}`, {}, ...inline(block.spans));
  if (block.kind === "quote") return element("blockquote", {}, ...inline(block.spans));
  if (block.kind === "list") {
    const items = block.items.map((each) => element("li", {}, ...inline(each)));
    return element(block.ordered ? "ol" : "ul", { start: block.ordered ? block.start : null }, ...items);
  }
  if (block.kind === "table") {
    const [head, ...rows] = block.rows.map((row, index) =>
      element("tr", {}, ...row.map((cell) => element(index ? "td" : "th", {}, ...inline(cell)))),
    );
    return element("div", { class: "table" }, element("table", {}, element("thead", {}, head), element("tbody", {}, ...rows)));
  }
  return element("p", {}, ...inline(block.spans));
}

function inline(parts) {
  const tags = { code: "code", strong: "strong", emphasis: "em" };
  return parts.map((part) => (part.kind === "text" ? part.text : element(tags[part.kind], {}, part.text)));
}

function begins(line) {
  return /^\s*(```|~~~|>)/.test(line) || /^#{1,6}\s/.test(line) || Boolean(marker(line));
}

function marker(line) {
  const found = /^\s*(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/.exec(line);
  return found && { ordered: found[1] !== undefined, start: Number(found[1] ?? 1), text: found[2] };
}

function isRow(line) {
  return line.trim().startsWith("|");
}

function isRule(line) {
  return line !== undefined && /^\s*\|[\s|:-]+$/.test(line) && line.includes("-");
}

function cells(row) {
  return row.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
}

/** The first line from `at` on that closes a fence, or the end: an answer may be on its way. */
function closing(lines, at, fence) {
  return whileTrue(lines, at, (each) => !each.trim().startsWith(fence));
}

function whileTrue(lines, at, holds) {
  while (at < lines.length && holds(lines[at])) at += 1;
  return at;
}
