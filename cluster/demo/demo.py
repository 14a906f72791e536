"""`flyray demo`: quantize, measure, serve, answer, run a batch, and stay up until Ctrl-C."""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from pathlib import Path

from rich.console import Console

from ..batch.http import HttpRunner
from ..batch.job import BatchSummary, run_batch
from ..config import FlyrayConfig, demo_config
from ..evaluate.score import Task, choose, read_tasks
from ..figures import Figure, write_figures
from ..http_chat import HttpChat
from ..serve import Server
from ..stop_signals import StopSignals
from .files import DEMO_TASKS, NAME
from .quality import DemoQuality, demo_quality

WORK_DIR = Path.home() / ".cache" / "flyray"
SERVED = "w4a8"
QUESTION = "What is 127 + 348?"
BATCH_LINES = 32
BATCH_MAX_TOKENS = 400


def run(
    *,
    once: bool = False,
    port: int = 8000,
    work_dir: str | Path = WORK_DIR,
    json_path: str | Path | None = None,
    console: Console | None = None,
    keep_logs: bool = False,
) -> int:
    """The command. What is quantized and measured is kept in work_dir, so a second run goes straight to serving.

    once: end after the batch instead of serving until Ctrl-C. Returns the exit code: 0, or 130 when a signal came
    before everything was shown. Raises what quantizing, evaluating and serving raise; nothing is left running.
    """
    console = console or Console()
    begin = time.monotonic()
    shown = False
    try:
        console.rule("Quantize and measure")
        quality = demo_quality(Path(work_dir), console, keep_logs=keep_logs)
        quality.print(console)
        console.rule("Serve")
        say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
        server = Server(served_config(quality, port), say=say, keep_logs=keep_logs)
        with StopSignals(server.end_now) as signals:
            try:
                server.start(signals.arm)
                figures = [
                    *quality.figures(),
                    Figure("seconds.start", server.start_seconds, "seconds"),
                    Figure("seconds.to_serving", time.monotonic() - begin, "seconds"),
                ]
                figures.append(stream_answer(server.url, console))
                figures += batch(server.url, Path(work_dir), console)
                if json_path is not None:
                    write_figures(json_path, figures)
                shown = True
                if not once:
                    console.print(
                        f"Serving at {server.url} until Ctrl-C. In a browser: {server.url}/, in a terminal: "
                        f"flyray chat {server.url}",
                        soft_wrap=True,
                    )
                    signals.wait()
            finally:
                signals.closing()
                server.stop()
    except KeyboardInterrupt:
        console.print("stopped")
    return 0 if shown else 130


def served_config(quality: DemoQuality, port: int) -> FlyrayConfig:
    """The demo's configuration, with the checkpoint that was quantized to `SERVED`."""
    config = demo_config(port, precision="auto")
    model = config.model.model_copy(update={"path": str(quality.kept[SERVED].path), "name": NAME})
    return config.model_copy(update={"model": model})


def stream_answer(url: str, console: Console) -> Figure:
    """Streams the answer to a sample question; returns tok_s.stream, from the first token to the last."""
    console.rule("A question, streamed")
    console.print(f"[bold]{QUESTION}[/]", highlight=False)
    request = {"model": NAME, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0}
    first = last = 0.0
    tokens = 0
    thinking = False
    with HttpChat(url) as chat:
        for news in chat.answer(request):
            last = time.monotonic()
            first = first or last
            if thinking and news.content:
                console.print("\n", end="")
            thinking = bool(news.reasoning)
            console.print(news.reasoning, end="", style="dim", highlight=False, markup=False)
            console.print(news.content, end="", style="bold green", highlight=False, markup=False)
            tokens = max(tokens, news.completion_tokens)
    rate = (tokens - 1) / (last - first)
    console.print(f"\n{tokens} tokens, {rate:.0f} tokens/s after the first", style="dim", highlight=False)
    return Figure("tok_s.stream", rate, "tokens/s")


def batch(url: str, work_dir: Path, console: Console) -> list[Figure]:
    """Runs a batch file of `BATCH_LINES` tasks through the running server and says how many answers are right."""
    console.rule(f"A batch of {BATCH_LINES} lines")
    tasks = batch_tasks()
    source, target = work_dir / "batch.jsonl", work_dir / "batch-results.jsonl"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("".join(json.dumps(batch_line(name, task)) + "\n" for name, task in tasks.items()))
    target.unlink(missing_ok=True)  # each demo shows a whole batch; `flyray batch` itself would skip what is done
    summary = asyncio.run(_run_batch(url, source, target))
    right = 0
    for line in target.read_text().splitlines():
        result = json.loads(line)
        task = tasks[result["custom_id"]]
        if result["response"]["status_code"] == 200:
            message = result["response"]["body"]["choices"][0]["message"]
            right += task.is_right(message)
    rate = summary.completion_tokens / summary.seconds
    console.print(
        f"{summary.succeeded} of {len(tasks)} lines completed in {summary.seconds:.1f} s ({rate:.0f} tokens/s), "
        f"{right} answers right: {target}",
        highlight=False,
    )
    return [
        Figure("batch.completed", summary.succeeded, "lines"),
        Figure("batch.right", right, "lines"),
        Figure("tok_s.batch", rate, "tokens/s"),
    ]


async def _run_batch(url: str, source: Path, target: Path) -> BatchSummary:
    async with HttpRunner(url) as runner:
        return await run_batch(runner, source, target, concurrency=BATCH_LINES)


def batch_tasks() -> dict[str, Task]:
    """`BATCH_LINES` tasks of all families by custom_id, the families in turns."""
    tasks = choose(read_tasks(DEMO_TASKS), BATCH_LINES)
    families = list(dict.fromkeys(task.family for task in tasks))
    queues = {family: [task for task in tasks if task.family == family] for family in families}
    turns = [queues[family][turn] for turn in range(BATCH_LINES) for family in families if turn < len(queues[family])]
    return {f"{task.family}-{number}": task for number, task in enumerate(turns[:BATCH_LINES], start=1)}


def batch_line(name: str, task: Task) -> dict[str, object]:
    """A line of a batch file that asks a task."""
    body = task.request(NAME, BATCH_MAX_TOKENS)
    return {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
