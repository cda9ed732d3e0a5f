"""Preflight checks: what is wrong with this machine, checkpoint and configuration, before any process is started.

Nothing here changes anything or needs torch. A check returns one row, or None where it does not apply (a CPU server
needs no driver). The model row covers the whole checkpoint; while it fails, checks that depend on the model's sizes
are left out.
"""

import dataclasses
import importlib
import json
import logging
import os
import pathlib
import resource
import shutil
import socket
import sys
from collections.abc import Callable
from typing import Literal

import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nmoe import envs, gpus
from nmoe.checkpoint import Checkpoint, open_checkpoint, tokenizer_file
from nmoe.config import Config
from nmoe.config_json import is_there
from nmoe.errors import CheckpointError, LaunchError
from nmoe.gpu_limits import refusals
from nmoe.memory import CPU_CACHE_SHARE, free_ram, pages_that_fill
from nmoe.printing import printing
from nmoe.slab import SlabLayout

_log = logging.getLogger("nmoe.doctor")
GIB = 1 << 30
WANTED_TOKENS = 4096  # of cache per running request; with less, long requests preempt each other
SHARED_BYTES_PER_RANK = 32 << 20  # of /dev/shm, for rendezvous between peers
_COLORS = {"ok": "green", "warn": "yellow", "fail": "red"}


class Row(msgspec.Struct, frozen=True):
    """The outcome of one check; every row that is not ok has a `remedy`."""

    name: str
    status: Literal["ok", "warn", "fail"]
    detail: str
    remedy: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """Facts shared by several checks, read once. `gpus` is None on the CPU."""

    config: Config
    checkpoint: Checkpoint | CheckpointError
    gpus: gpus.Survey | None
    ram_free: int  # bytes available to new processes


Check = Callable[[Facts], Row | None]


def checks(config: Config) -> list[Row]:
    """Run every check that applies."""
    facts = _gather(config)
    return [row for check in CHECKS if (row := check(facts)) is not None]


def run(config: Config, as_json: bool = False) -> int:
    """Print the checks to standard output. Returns the exit code: 1 if any fails. Raises LaunchError if nobody can read
    them there: a full disk, a closed pipe."""
    rows = checks(config)
    try:
        with printing():
            if as_json:  # by the module that takes any path, also no UTF-8
                sys.stdout.write(json.dumps(msgspec.to_builtins(rows), indent=2) + "\n")
            else:
                report(rows, Console())
    except OSError as error:
        raise LaunchError(
            f"standard output cannot be written ({error.strerror}); print the checks elsewhere"
        ) from error
    return int(any(row.status == "fail" for row in rows))


def require(config: Config) -> None:
    """Log warnings; if any check fails, raise LaunchError with every failing row and its remedy."""
    rows = checks(config)
    for row in rows:
        if row.status == "warn":
            _log.warning("%s: %s; %s", row.name, row.detail, row.remedy)
    failed = [f"  - {row.name}: {row.detail}\n    remedy: {row.remedy}" for row in rows if row.status == "fail"]
    if failed:
        raise LaunchError("\n".join([f"{len(failed)} preflight check(s) failed", *failed]))


def report(rows: list[Row], console: Console) -> None:
    """Print the rows as a table, each remedy below its row."""
    table = Table("check", "", "found", box=None, pad_edge=False)
    for row in rows:
        # As Text, because "[model] path" is not console markup.
        table.add_row(row.name, Text(row.status, _COLORS[row.status]), Text(row.detail))
        if row.remedy:
            table.add_row("", "", Text.assemble(("remedy: ", "bold"), row.remedy))
    console.print(table)


def _gather(config: Config) -> Facts:
    try:
        checkpoint: Checkpoint | CheckpointError = open_checkpoint(config)
    except CheckpointError as error:
        checkpoint = error
    cuda = config.parallel.device == "cuda"
    survey = gpus.survey(envs.get("CUDA_VISIBLE_DEVICES"), config.parallel.world_size) if cuda else None
    return Facts(config, checkpoint, survey, free_ram())


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB" if size >= 0.1 * GIB else f"{size / (1 << 20):.1f} MiB"


# --------------------------------------------------------------------------------------------------- model and cache


def _split(error: CheckpointError) -> tuple[str, str]:
    """Split a checkpoint error, which ends in "; what to do", into detail and remedy."""
    detail, _, remedy = str(error).rpartition("; ")
    return (detail, remedy) if detail else (remedy, "check the files under [model] path")


def _model(facts: Facts) -> Row:
    if isinstance(facts.checkpoint, CheckpointError):
        return Row("model", "fail", *_split(facts.checkpoint))
    architecture, tensors = facts.checkpoint.architecture, facts.checkpoint.tensors
    count = architecture.num_params()
    size = f"{count / 1e9:.1f} B parameters" if count >= 1e9 else f"{count / 1e6:.1f} M parameters"
    if not tensors:
        return Row("model", "ok", f"{architecture.model_type}, {size}, random weights")
    shards, disk = len({info.file for info in tensors.values()}), sum(info.num_bytes for info in tensors.values())
    return Row("model", "ok", f"{architecture.model_type}, {size}, {shards} file(s) of {_gib(disk)}, all present")


def _tokenizer(facts: Facts) -> Row | None:
    model, folder = facts.config.model, pathlib.Path(facts.config.model.path)
    if not os.path.isdir(folder):  # pathlib raises if a folder above it may not be searched
        return None  # missing (the model row reports that), or a benchmark's config.json: prompts are token ids
    try:
        if model.weights == "random" and not is_there(folder / "tokenizer.json"):
            return None  # same as for a config.json
        if isinstance(facts.checkpoint, CheckpointError):
            tokenizer_file(model.path)
        else:
            # Imported by name, like a child's module: the root and the command line do not load frontend libraries.
            prompt = importlib.import_module("nmoe.frontend.prompt")
            prompt.load_prompts(facts.config, (), facts.checkpoint.architecture.vocab_size)
        return Row("tokenizer", "ok", "tokenizer.json")
    except CheckpointError as error:
        return Row("tokenizer", "fail", *_split(error))


def _weight_bytes(facts: Facts, checkpoint: Checkpoint) -> int:
    """Weight bytes of one rank. FP8 weights are expanded on the CPU and stay FP8 on a GPU."""
    architecture, parallel = checkpoint.architecture, facts.config.parallel
    quantised = architecture.quant_block is not None and parallel.device == "cuda"
    return architecture.weight_bytes(checkpoint.dtype, parallel.world_size, quantised=quantised)


def _memory_per_rank(facts: Facts) -> tuple[str, int] | None:
    """What kind of memory one rank's weights and cache use, and how many bytes; None if the GPUs are unknown."""
    world_size, unused = facts.config.parallel.world_size, 1 - facts.config.engine.gpu_memory_utilization
    if facts.gpus is None:
        return "free memory", facts.ram_free // world_size
    if not facts.gpus.gpus:
        return None
    exchanged = 0
    if world_size > 1 and not isinstance(facts.checkpoint, CheckpointError):
        exchanged = SlabLayout.of(facts.checkpoint.architecture, facts.checkpoint.dtype, facts.config).slab_bytes
    what = f"a GPU, {_gib(exchanged)} of it for exchange apart" if exchanged else "a GPU"
    return what, min(max(0, gpu.free - int(gpu.total * unused) - exchanged) for gpu in facts.gpus.gpus[:world_size])


def _num_pages(facts: Facts, checkpoint: Checkpoint, memory: int) -> int:
    """[engine] num_pages, or what a rank will choose: enough for a full batch, as far as memory allows."""
    engine = facts.config.engine
    if engine.num_pages:
        return engine.num_pages
    room = (memory - _weight_bytes(facts, checkpoint)) * (CPU_CACHE_SHARE if facts.gpus is None else 1.0)
    page_bytes = _page_bytes(facts, checkpoint)
    return pages_that_fill(engine, checkpoint.architecture, checkpoint.max_seq_len, page_bytes, room)


def _page_bytes(facts: Facts, checkpoint: Checkpoint) -> int:
    return checkpoint.architecture.cache_bytes_per_token(checkpoint.dtype) * facts.config.engine.page_size


def _memory(facts: Facts) -> Row | None:
    memory = _memory_per_rank(facts)
    if isinstance(facts.checkpoint, CheckpointError) or memory is None:
        return None
    what, available = memory
    weights, page = _weight_bytes(facts, facts.checkpoint), _page_bytes(facts, facts.checkpoint)
    cache = (_num_pages(facts, facts.checkpoint, available) + 1) * page  # one page is reserved
    detail = f"per rank: weights {_gib(weights)} + cache {_gib(cache)} of {_gib(available)} ({what})"
    if weights + cache <= available:
        return Row("memory", "ok", detail)
    most = (available - weights) // page - 1
    if most < 1:
        return Row("memory", "fail", detail, "raise [parallel] world_size, free memory, or serve a smaller model")
    return Row("memory", "fail", detail, f"set [engine] num_pages to at most {most}, or 0 to fill what is left")


def _capacity(facts: Facts) -> Row | None:
    memory = _memory_per_rank(facts)
    if isinstance(facts.checkpoint, CheckpointError) or memory is None:
        return None
    engine, checkpoint = facts.config.engine, facts.checkpoint
    pages = _num_pages(facts, checkpoint, memory[1])
    each = min(WANTED_TOKENS, checkpoint.max_seq_len)
    wanted = engine.max_batch_size * each
    detail = (
        f"{pages * engine.page_size:,} tokens per rank; {engine.max_batch_size} requests of {each:,} are {wanted:,}"
    )
    if pages * engine.page_size >= wanted:
        return Row("KV capacity", "ok", detail)
    tokens = max(2, pages * engine.page_size)
    remedy = f"lower [engine] max_batch_size to {max(1, tokens // each)}"
    if tokens < each:  # there is not even room for one request
        remedy += f" and [model] max_seq_len to {tokens}"
    if engine.num_pages:
        remedy += f", or raise num_pages to {-(-wanted // engine.page_size)}"
    return Row("KV capacity", "warn", detail, remedy)


# --------------------------------------------------------------------------------------------------------------- GPUs


def _gpus(facts: Facts) -> Row | None:
    if facts.gpus is None:
        return None
    if facts.gpus.problem:
        remedy = "install the NVIDIA driver and see that nvidia-smi runs, or set [parallel] device = 'cpu'"
        return Row("GPUs", "fail", f"NVML: {facts.gpus.problem}", remedy)
    found, needed = len(facts.gpus.gpus), facts.config.parallel.world_size
    names = ", ".join(sorted({gpu.name for gpu in facts.gpus.gpus}))
    if found < needed:
        remedy = f"set [parallel] world_size to at most {found}, or check CUDA_VISIBLE_DEVICES"
        return Row("GPUs", "fail", f"{found} for world_size = {needed} ({names or 'none'})", remedy)
    return Row("GPUs", "ok", f"{found} for world_size = {needed} ({names})")


def _kernels(facts: Facts) -> Row | None:
    if facts.gpus is None or not facts.gpus.gpus or isinstance(facts.checkpoint, CheckpointError):
        return None
    checkpoint, page_size = facts.checkpoint, facts.config.engine.page_size
    capabilities = sorted({gpu.capability for gpu in facts.gpus.gpus[: facts.config.parallel.world_size]})
    found = [refusals(checkpoint.architecture, checkpoint.dtype, page_size, capability) for capability in capabilities]
    if reasons := list(dict.fromkeys(reason for reasons in found for reason in reasons)):
        remedy = "choose a model and GPUs that fit, or set [parallel] device = 'cpu'"
        return Row("kernels", "fail", "; ".join(reasons), remedy)
    return Row("kernels", "ok", "they can run this model on these GPUs")


def _driver(facts: Facts) -> Row | None:
    if facts.gpus is None or facts.gpus.problem:
        return None
    built = gpus.torch_cuda()
    detail = f"{facts.gpus.driver}, CUDA {'.'.join(map(str, facts.gpus.cuda))}; torch is built for CUDA {built}"
    if built is None:
        return Row("driver", "fail", detail, "install a torch that is built with CUDA")
    if facts.gpus.cuda[0] < int(built.split(".")[0]):
        return Row("driver", "fail", detail, f"install a driver that supports CUDA {built}")
    return Row("driver", "ok", detail)


def _peers(facts: Facts) -> Row | None:
    if facts.gpus is None or facts.gpus.problem or facts.config.parallel.world_size == 1:
        return None
    if facts.gpus.unlinked:
        pairs = ", ".join(f"{i} -> {j}" for i, j in facts.gpus.unlinked[:4])
        remedy = "use GPUs that `nvidia-smi topo -p2p w` shows as OK, or switch off the IOMMU and PCIe ACS"
        return Row("peer access", "fail", f"no access between {len(facts.gpus.unlinked)} pair(s): {pairs}", remedy)
    return Row("peer access", "ok", "every GPU reaches every other")


def _allocator(facts: Facts) -> Row | None:
    """PYTORCH_ALLOC_CONF, the newer name, would override what the launcher sets."""
    if facts.gpus is None:
        return None
    name, winning = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
    ours = envs.for_children(facts.config)[name]
    if (theirs := envs.get(winning)) is not None and theirs != ours:
        return Row("allocator", "fail", f"{winning}={theirs} overrides {ours}", f"unset {winning}")
    if (theirs := envs.get(name)) is not None and theirs != ours:
        return Row("allocator", "warn", f"{name}={theirs} is replaced by {ours}", f"unset {name}")
    return Row("allocator", "ok", ours)


def _interface(facts: Facts) -> Row | None:
    if facts.gpus is None:
        return None
    name = envs.for_children(facts.config)["NCCL_SOCKET_IFNAME"]
    flags = pathlib.Path("/sys/class/net") / name / "flags"
    if flags.exists() and int(flags.read_text(encoding="ascii"), 16) & 1:  # IFF_UP
        return Row("network interface", "ok", name)
    return Row("network interface", "fail", f"{name} is down or absent", f"run: ip link set {name} up")


def _kernel_cache(facts: Facts) -> Row | None:
    if facts.gpus is None:
        return None
    folder = pathlib.Path(facts.config.engine.cache_dir)
    there = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        remedy = "set [engine] cache_dir to a folder that you may write"
        return Row("kernel cache", "fail", f"{folder}: cannot write to {there}", remedy)
    free = shutil.disk_usage(there).free
    if free < GIB:
        return Row("kernel cache", "warn", f"{folder}: {_gib(free)} free", "free 1 GiB, or move [engine] cache_dir")
    return Row("kernel cache", "ok", f"{folder}, {_gib(free)} free")


# ------------------------------------------------------------------------------------------------------------- system


def _shared_memory(facts: Facts) -> Row:
    folder, needed = pathlib.Path("/dev/shm"), SHARED_BYTES_PER_RANK * facts.config.parallel.world_size
    free = shutil.disk_usage(folder).free if folder.is_dir() else 0
    detail = f"/dev/shm has {_gib(free)} free of the {_gib(needed)} needed"
    if free >= needed:
        return Row("shared memory", "ok", detail)
    return Row("shared memory", "fail", detail, "mount a larger /dev/shm (docker run --shm-size=1g), or empty it")


def _open_files(facts: Facts) -> Row:
    """Each frontend connection is an open file; every waiting or running request has one."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    limit = sys.maxsize if limit == resource.RLIM_INFINITY else limit
    config = facts.config
    requests = config.server.max_queue + config.engine.max_batch_size * config.parallel.world_size
    needed = 128 + -(-requests // config.server.processes)
    detail = f"{limit:,} per process; {requests:,} requests over {config.server.processes} frontend(s) need {needed:,}"
    if limit >= needed:
        return Row("open files", "ok", detail)
    remedy = f"run `ulimit -n {needed}` before, or lower [server] max_queue"
    return Row("open files", "fail" if limit < 256 else "warn", detail, remedy)


def _trace(facts: Facts) -> Row | None:
    if not facts.config.trace.record:
        return None
    file = pathlib.Path(facts.config.trace.record)
    if not _can_write(file):
        remedy = "set [trace] record to a file in a folder that is there and that you may write"
        return Row("trace", "fail", f"{file}: cannot be written", remedy)
    return Row("trace", "ok", str(file))


def _can_write(file: pathlib.Path) -> bool:
    """Whether `file` can be written, or made."""
    try:
        return not file.is_dir() and os.access(file if file.exists() else file.parent, os.W_OK)
    except OSError:  # a folder above it may not be searched, or the name is too long
        return False


def _port(facts: Facts) -> Row:
    host, port = facts.config.server.host, facts.config.server.port
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        detail = f"cannot listen on {host}:{port}: {error.strerror or error}"
        return Row(
            "port", "fail", detail, "set [server] port to a free one (0: any), host to an address of this machine"
        )
    return Row("port", "ok", f"{host}:{port} is free" if port else f"{host}, any free port")


CHECKS: tuple[Check, ...] = (
    _model,
    _tokenizer,
    _memory,
    _capacity,
    _gpus,
    _kernels,
    _driver,
    _peers,
    _allocator,
    _interface,
    _kernel_cache,
    _shared_memory,
    _open_files,
    _trace,
    _port,
)
