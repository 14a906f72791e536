"""`flyray chat`: a conversation in the terminal, streamed, the thinking dimmed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from .config import demo_config
from .held_port import HeldPort
from .http_chat import ChatClientError, HttpChat
from .serve import Server
from .stop_signals import Stopped, StopSignals

_HELP = "Type a message; /new begins afresh, /quit or Ctrl-D ends."


@dataclass(frozen=True)
class ChatSettings:
    """model: None for the server's first. temperature and max_tokens: None for the server's defaults."""

    model: str | None = None
    system: str | None = None
    thinking: bool = True
    temperature: float | None = None
    max_tokens: int | None = None

    def request(self, model: str, messages: list[dict[str, Any]]) -> dict[str, Any]:
        """A chat request's body."""
        body: dict[str, Any] = {"model": model, "messages": messages, "thinking": self.thinking}
        optional = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return body | {name: value for name, value in optional.items() if value is not None}

    @property
    def opening(self) -> list[dict[str, Any]]:
        """The messages that a conversation begins with."""
        return [{"role": "system", "content": self.system}] if self.system else []


def converse_demo(settings: ChatSettings, *, keep_logs: bool = False) -> None:
    """Talks to the demo model, served for the time of the conversation."""
    console = Console(highlight=False)
    with HeldPort() as port:
        server = Server(demo_config(port=port.number), say=lambda _: None, keep_logs=keep_logs)
        _talk(server, settings, console)


def _talk(server: Server, settings: ChatSettings, console: Console) -> None:
    with StopSignals(server.end_now) as signals:
        try:
            with console.status("starting the demo model"):
                server.start(signals.arm)
            signals.disarm()
            converse(server.url, settings)
        except KeyboardInterrupt:
            pass
        finally:
            signals.closing()
            server.stop()


def converse(url: str, settings: ChatSettings, api_key: str = "") -> None:
    """Talks until the input ends. Raises ChatClientError if the server cannot be reached at the start."""
    console = Console(highlight=False)
    with HttpChat(url, api_key) as chat:
        model = settings.model or chat.model()
        console.print(f"{model} at {url}. {_HELP}", style="dim")
        messages = settings.opening
        while (text := _ask(console)) is not None:
            if text == "/new":
                messages = settings.opening
            elif text.strip():
                question = [*messages, {"role": "user", "content": text}]
                try:
                    messages = [*question, _answer(console, chat, settings.request(model, question))]
                except ChatClientError as error:
                    console.print(Text(str(error), "red"))
                except Stopped:
                    raise
                except KeyboardInterrupt:
                    console.print("\n(cut off)", style="dim")


def _ask(console: Console) -> str | None:
    try:
        text = console.input("[bold]> [/bold]")
    except Stopped:
        raise
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None
    return None if text in ("/quit", "/exit") else text


def _answer(console: Console, chat: HttpChat, request: dict[str, Any]) -> dict[str, Any]:
    """Prints an answer as it comes and returns it as a message of the history."""
    content = ""
    thinking = False
    tokens = 0
    begin = time.monotonic()
    first = 0.0
    finish = ""
    for news in chat.answer(request):
        first = first or time.monotonic()
        tokens = news.completion_tokens or tokens
        finish = news.finish or finish
        if thinking and (news.content or news.tool_call):
            console.print()
        thinking = bool(news.reasoning) or (thinking and not (news.content or news.tool_call))
        for text, style in ((news.reasoning, "dim italic"), (news.content, ""), (news.tool_call, "cyan")):
            if text:
                console.print(Text(text, style), end="", soft_wrap=True)
        content += news.content
    seconds = time.monotonic() - first
    rate = f"{(tokens - 1) / seconds:.0f} tokens/s" if tokens > 1 and seconds > 0 else ""
    cut = ", cut off at the limit" if finish == "length" else ""
    console.print(f"\n({tokens} tokens, first after {1000 * (first - begin):.0f} ms, {rate}{cut})", style="dim")
    return {"role": "assistant", "content": content}
