"""The GPUs of this machine as reported by the driver through NVML: without torch and without a CUDA context."""

import importlib.metadata
import pathlib
import re

import msgspec
import pynvml

_P2P_ABILITIES = (0, 1)  # nvml.h's NVML_P2P_CAPS_INDEX_READ and _WRITE; pynvml defines the former as a tuple


class Gpu(msgspec.Struct, frozen=True):
    """One GPU; memory in bytes."""

    name: str
    free: int
    total: int
    capability: tuple[int, int]  # compute capability


class Survey(msgspec.Struct, frozen=True):
    """What NVML reports, or the `problem` if it cannot."""

    problem: str = ""
    driver: str = ""
    cuda: tuple[int, int] = (0, 0)  # the newest CUDA version the driver supports
    gpus: tuple[Gpu, ...] = ()
    unlinked: tuple[tuple[int, int], ...] = ()  # pairs without access to each other's memory


def survey(visible: str | None, world_size: int) -> Survey:
    """Query the GPUs named by `visible` (CUDA_VISIBLE_DEVICES), and peer access among the first `world_size`."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return Survey(problem=str(error))
    try:
        handles = _handles(visible)
        version = pynvml.nvmlSystemGetCudaDriverVersion_v2()
        return Survey(
            driver=pynvml.nvmlSystemGetDriverVersion(),
            cuda=(version // 1000, version % 1000 // 10),
            gpus=tuple(_describe(handle) for handle in handles),
            unlinked=_unlinked(handles[:world_size]),
        )
    except pynvml.NVMLError as error:
        return Survey(problem=str(error))
    finally:
        pynvml.nvmlShutdown()


def _handles(visible: str | None) -> list[object]:
    if visible is None:
        return [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
    names = [name.strip() for name in visible.split(",") if name.strip()]
    return [
        pynvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else pynvml.nvmlDeviceGetHandleByUUID(name)
        for name in names
    ]


def _describe(handle: object) -> Gpu:
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    return Gpu(pynvml.nvmlDeviceGetName(handle), int(memory.free), int(memory.total), (major, minor))


def _unlinked(handles: list[object]) -> tuple[tuple[int, int], ...]:
    def linked(one: object, other: object) -> bool:
        return all(
            pynvml.nvmlDeviceGetP2PStatus(one, other, ability) == pynvml.NVML_P2P_STATUS_OK
            for ability in _P2P_ABILITIES
        )

    count = len(handles)
    return tuple((i, j) for i in range(count) for j in range(count) if i != j and not linked(handles[i], handles[j]))


def torch_cuda() -> str | None:
    """The CUDA version the installed torch was built for; None for a build without CUDA. Does not import torch."""
    source = pathlib.Path(str(importlib.metadata.distribution("torch").locate_file("torch/version.py")))
    found = re.search(r"^cuda\b.*= '([\d.]+)'", source.read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else None
