"""Every error that nmoe raises on purpose.

NmoeError                    a message for the operator: what is wrong and what to set
├── ConfigError              the TOML file: every problem at once
├── CheckpointError          the model folder: config.json, shards, shapes, tokenizer
├── LaunchError              a process failed to start or died
├── PeerSilent               a worker waited in vain for others; names them
└── RequestError             one request is refused; carries the HTTP status and the field
Anything else that escapes is a defect and keeps its traceback.
"""


class NmoeError(Exception):
    """Base class; `str(error)` is the whole message for the operator, remedy included."""


class ConfigError(NmoeError):
    """The configuration is unusable; lists all problems found, one per line."""

    def __init__(self, source: str, problems: list[str]) -> None:
        self.problems = problems
        super().__init__("\n".join([f"{source}: {len(problems)} problem(s)", *(f"  - {line}" for line in problems)]))


class CheckpointError(NmoeError):
    """The model folder cannot be served; says which file or tensor is at fault and what to do."""


class LaunchError(NmoeError):
    """A process of the server failed to start or died."""


class PeerSilent(NmoeError):
    """Worker `rank` waited in vain for the ranks `silent`; everything it has computed since is void."""

    def __init__(self, rank: int, silent: list[int], seconds: float) -> None:
        self.silent = silent
        super().__init__(
            f"worker {rank}: nothing came from worker {' and '.join(map(str, silent))} within {seconds:.1f} s, so the"
            " workers' steps are void; the silent worker's log says why it stopped, and all workers must start again"
        )


class RequestError(NmoeError):
    """One request is refused, in the shape of OpenAI's error object.

    `status` is the HTTP status, `param` the request's field (None when no single field is at fault),
    `code` OpenAI's machine-readable code.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def type(self) -> str:
        """OpenAI's name for this kind of error."""
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, "invalid_request_error")
