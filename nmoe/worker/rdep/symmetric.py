"""Slabs in GPU memory, mapped by all ranks: torch symmetric memory, with rendezvous by a file in the run directory.

The process group below is used only for the rendezvous, on the CPU; no part of a step goes through it.
"""

import datetime
import pathlib

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from nmoe.errors import LaunchError

_TIMEOUT = datetime.timedelta(minutes=10)


class PeerSlabs:
    """This rank's slab, and the address of every rank's slab in this process. They live as long as this object."""

    def __init__(self, num_bytes: int, rank: int, world_size: int, device: torch.device, meeting: pathlib.Path) -> None:
        """Wait until every rank has come to `meeting`, a path unused by any earlier life of the workers. Raises
        LaunchError if the GPUs cannot map each other's memory."""
        self.slab = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
        self.slab.zero_()  # before the rendezvous, because the other ranks write right after it
        torch.cuda.synchronize(device)
        store = dist.FileStore(str(meeting), world_size)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT)
        try:
            self._handle = symmetric_memory.rendezvous(self.slab, dist.distributed_c10d._get_default_group())
        except RuntimeError as error:
            raise LaunchError(
                f"worker {rank}: the GPUs cannot map each other's memory: {error}; see that"
                " `nvidia-smi topo -p2p w` says OK for every pair"
            ) from None
        finally:
            dist.destroy_process_group()
        self.bases = list(self._handle.buffer_ptrs)
        assert self.bases[rank] == self.slab.data_ptr()
