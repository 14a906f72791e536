// Server-sent events out of text that comes in any pieces.

export class EventParser {
  #rest = "";

  /** A piece of text; returns the data of the events that it completes. */
  feed(text) {
    const lines = (this.#rest + text).split("\n");
    this.#rest = lines.pop();
    return lines
      .map((line) => (line.endsWith("\r") ? line.slice(0, -1) : line))
      .filter((line) => line.startsWith("data:"))
      .map((line) => line.slice(line[5] === " " ? 6 : 5));
  }
}
