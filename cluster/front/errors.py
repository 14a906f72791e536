"""What a client did wrong, or what the engine could not do, in OpenAI's error form."""

from __future__ import annotations

from typing import Any

# Seconds to wait for an engine of which nothing is known.
START_S = 5


class RequestError(Exception):
    """An error to answer a request with.

    status: HTTP status. param: the field at fault, as "messages[0].content", or None. code: a stable short name.
    retry_after: seconds after which it is worth trying again, or None.
    """

    def __init__(
        self, message: str, *, status: int = 400, param: str | None = None, code: str, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.param = param
        self.code = code
        self.retry_after = retry_after

    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}."""
        kind = {429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class EngineUnavailable(RequestError):
    """The engine cannot take or finish a request: not ready, dead, or failed while it ran."""

    def __init__(self, message: str, retry_after: int | None = None) -> None:
        """retry_after: seconds, where more is known than that an engine takes some to start."""
        seconds = START_S if retry_after is None else retry_after
        super().__init__(message, status=503, code="engine_unavailable", retry_after=seconds)
