"""The TOML file: sections, keys, defaults and every check that needs only the file itself.

`load_config` reports all problems at once, each with its remedy. Checks that look at the machine or the checkpoint
belong to the doctor (`nmoe/doctor.py`).
"""

import difflib
import pathlib
import re
from typing import Annotated, Any, Literal

import msgspec
import tomli

from nmoe.errors import ConfigError

_CONTROLS = re.compile(r"[\x00-\x1f\x7f]")
_MOST = (1 << 31) - 1  # of any count: pages, slots and positions are int32
AtLeast0 = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
AtLeast1 = Annotated[int, msgspec.Meta(ge=1, le=_MOST)]
Port = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]  # what timers take; infinity is not a time to wait


class Model(msgspec.Struct, frozen=True):
    """[model]: what is served. The architecture itself comes from the checkpoint's config.json."""

    path: str = ""  # folder of the checkpoint; a config.json alone will do for random weights
    name: str = ""  # served id; empty: the folder's name
    weights: Literal["checkpoint", "random"] = "checkpoint"
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # auto: as the checkpoint says
    max_seq_len: AtLeast0 = 0  # prompt and output together; 0: as the checkpoint says
    attention_type: Literal["auto", "mla", "dsa"] = "auto"


class Parallel(msgspec.Struct, frozen=True):
    """[parallel]: one worker process per rank, one GPU each."""

    world_size: Literal[1, 2, 4, 8] = 8
    device: Literal["cuda", "cpu"] = "cuda"


class Engine(msgspec.Struct, frozen=True):
    """[engine]: cache, batch and step sizes."""

    num_pages: AtLeast0 = 0  # per rank; 0: fill the memory
    page_size: Annotated[int, msgspec.Meta(ge=1, le=256)] = 64  # tokens
    max_batch_size: Annotated[int, msgspec.Meta(ge=1, le=4096)] = 256  # running requests per rank
    max_prefill_tokens: AtLeast1 = 16384  # per step, over all ranks
    moe_expected_m: Annotated[int, msgspec.Meta(ge=16, le=_MOST, multiple_of=16)] = 64  # rows per expert
    enable_cuda_graph: bool = True
    enable_overlap: bool = True  # plan step k+1 while step k runs
    enable_prefix_cache: bool = True
    gpu_memory_utilization: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.9
    cache_dir: str = "~/.cache/nmoe"  # compiled kernels


class Server(msgspec.Struct, frozen=True):
    """[server]: the HTTP side."""

    host: str = "127.0.0.1"
    port: Port = 8000  # 0: any free port
    processes: Annotated[int, msgspec.Meta(ge=1, le=64)] = 1
    api_keys: tuple[str, ...] = ()  # empty: no authentication
    max_queue: AtLeast1 = 4096  # waiting requests of one lane; one more is refused with 429
    max_body_mb: AtLeast1 = 32
    request_timeout_s: Seconds = 0.0  # a request not finished by then ends with an error; 0: never
    drain_timeout_s: Seconds = 30.0  # how long SIGTERM lets running requests finish


class Trace(msgspec.Struct, frozen=True):
    """[trace]: one JSON line per finished request, for benchmarks/replay.py."""

    record: str = ""  # path of the JSONL file; empty: off


class Benchmark(msgspec.Struct, frozen=True):
    """[benchmark]: read by benchmarks/ only; `nmoe serve` ignores it."""

    mode: Literal["decode", "prefill"] = "decode"
    decode_batch_size: AtLeast1 = 256  # per GPU
    decode_ctx_len: AtLeast1 = 2000  # tokens
    output_len: AtLeast1 = 100  # tokens
    prompt_len: AtLeast1 = 2000  # tokens, mode "prefill"
    num_prompts: AtLeast1 = 64  # mode "prefill"
    seed: AtLeast0 = 0


class Config(msgspec.Struct, frozen=True):
    """The whole configuration."""

    model: Model = Model()
    parallel: Parallel = Parallel()
    engine: Engine = Engine()
    server: Server = Server()
    trace: Trace = Trace()
    benchmark: Benchmark = Benchmark()

    @property
    def steps_in_flight(self) -> int:
        """How many steps may be launched before the result of the first one is back."""
        return 2 if self.engine.enable_overlap else 1

    @property
    def num_slots(self) -> int:
        """Rows of a worker's slot table. A request whose last step was launched keeps its slot until its last result is
        back, at most two steps later, so twice the batch is always enough."""
        return 2 * self.engine.max_batch_size

    @property
    def model_name(self) -> str:
        """The id that clients name in the field `model`."""
        return self.model.name or pathlib.Path(self.model.path).name.removesuffix(".json")


def _nearest(word: str, known: list[str], what: str) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"did you mean {what.format(close[0])}?" if close else "known: " + ", ".join(map(what.format, known))


def _unknown(name: str, given: Any, kinds: dict[str, type[msgspec.Struct]]) -> str:
    """Explain what is wrong with a top-level name that is not a section."""
    if isinstance(given, dict):
        return f"[{name}]: unknown section; {_nearest(name, list(kinds), '[{}]')}"
    homes = [section for section, kind in kinds.items() if name in kind.__struct_fields__]
    sections = " or ".join(f"[{section}]" for section in homes or kinds)
    return f"{name}: a key outside of any section; put it under {sections}"


def _section(name: str, kind: type[msgspec.Struct], given: Any, problems: list[str]) -> Any:
    """Build the section's Struct from its TOML table; append problems to `problems`."""
    if not isinstance(given, dict):
        problems.append(f"[{name}] must be a table, not {type(given).__name__}")
        return kind()
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in fields:
            problems.append(f"[{name}] {key}: unknown key; {_nearest(key, list(fields), '{}')}")
            continue
        try:
            values[key] = msgspec.convert(value, fields[key])
        except msgspec.ValidationError as error:
            problems.append(f"[{name}] {key} = {value!r}: {_explain(error, fields[key])}")
    return kind(**values)


def _explain(error: msgspec.ValidationError, kind: Any) -> str:
    if (choices := getattr(kind, "__args__", None)) and "enum value" in str(error).lower():
        return "must be one of " + ", ".join(repr(choice) for choice in choices)
    return str(error)[0].lower() + str(error)[1:]


def _contradictions(config: Config) -> list[str]:
    problems = []
    engine = config.engine
    if not config.model.path:
        problems.append("[model] path: missing; set it to the checkpoint's folder")
    if engine.max_prefill_tokens < config.parallel.world_size:
        problems.append(
            f"[engine] max_prefill_tokens = {engine.max_prefill_tokens}: every rank needs at least one token a step;"
            f" set it to at least world_size = {config.parallel.world_size}"
        )
    if engine.num_pages and engine.num_pages * engine.page_size < 2:
        problems.append("[engine] num_pages: the cache holds fewer than two tokens; raise num_pages or page_size")
    if any(not key or key != key.strip() or _CONTROLS.search(key) for key in config.server.api_keys):
        problems.append(
            "[server] api_keys: a key is empty, or has control characters or spaces around it, which no client can"
            " send; remove it, or set api_keys = [] to serve without authentication"
        )
    if not _can_name_a_host(config.server.host):
        problems.append(
            f"[server] host = {config.server.host!r}: cannot be a host's name; set it to an address of this machine"
        )
    return problems


def _can_name_a_host(name: str) -> bool:
    try:
        return bool(name.encode("idna")) and not _CONTROLS.search(name)  # as sockets encode it
    except UnicodeError:
        return False


def load_config(path: str | pathlib.Path) -> Config:
    """Read and check a TOML file. Relative paths in it are relative to its folder.

    Raises ConfigError with every problem found.
    """
    path = pathlib.Path(path)
    try:
        document = tomli.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        problem = f"cannot be read: {error.strerror}; check the path after --config and its permissions"
        raise ConfigError(str(path), [problem]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), [f"is not UTF-8, as TOML must be ({error}); save it as UTF-8"]) from None
    except tomli.TOMLDecodeError as error:
        raise ConfigError(str(path), [f"is not valid TOML: {error}"]) from None

    kinds = {field.name: field.type for field in msgspec.structs.fields(Config)}
    unknown = [name for name in document if name not in kinds]
    problems = [_unknown(name, document[name], kinds) for name in unknown]
    sections = {name: _section(name, kind, document.get(name, {}), problems) for name, kind in kinds.items()}
    config = Config(**sections)
    # A key that failed to convert has its default here, so a contradiction could be an artefact of the wrong value.
    problems += _contradictions(config) if not problems else []
    if problems:
        raise ConfigError(str(path), problems)
    config = _anchor(config, path.parent, problems)
    if problems:
        raise ConfigError(str(path), problems)
    return config


def _anchor(config: Config, folder: pathlib.Path, problems: list[str]) -> Config:
    """Make the configuration's paths absolute; append unusable ones to `problems`."""

    def absolute(key: str, name: str) -> str:
        try:
            return str((folder / pathlib.Path(name).expanduser()).resolve()) if name else ""
        except (RuntimeError, ValueError, OSError) as error:  # no such user's home; a null byte; a loop of links
            problems.append(f"{key} = {name!r}: is not a usable path ({error}); write it out from /")
            return ""

    replace = msgspec.structs.replace
    return replace(
        config,
        model=replace(config.model, path=absolute("[model] path", config.model.path)),
        engine=replace(config.engine, cache_dir=absolute("[engine] cache_dir", config.engine.cache_dir)),
        trace=replace(config.trace, record=absolute("[trace] record", config.trace.record)),
    )
