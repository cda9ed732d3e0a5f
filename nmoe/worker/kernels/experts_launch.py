"""What the launches of the experts' kernels have in common, in bfloat16 and FP8: when one kernel computes routed and
shared experts, and how much memory it takes.

Shape suffixes: T tokens, K experts per token.
"""

from typing import NamedTuple

import torch

from nmoe.architecture import Architecture
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.experts import Arrived
from nmoe.worker.kernels.experts_triton import Terms, most_tiles
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.kernels.warps_gluon import OUTPUTS, Form


def takes_shared(tokens: int, architecture: Architecture) -> bool:
    """Whether one kernel computes the routed and the shared experts of this many tokens, if all experts are on this
    rank: in the steps whose kernels are launched early, unless few experts are chosen. In longer ones the library's
    products are faster."""
    a = architecture
    blocks = a.hidden_size % 128 == 0 and a.moe_intermediate_size % 128 == 0
    return blocks and a.num_shared_experts > 0 and early(tokens) and tokens * a.num_experts_per_tok >= a.num_experts


def rows_per_expert(x: object, routes: Routes, num_experts: int) -> float:
    """How many rows an expert has on average."""
    return x.per_expert if isinstance(x, Arrived) else routes.weights_TK.numel() / num_experts


class Room(NamedTuple):
    """The tiles of a launch, and the memory that they need."""

    most: int  # tiles of routed experts
    between: int  # rows of an expert's intermediate size
    pieces: int  # of the product that has more of them
    out: int  # rows of the hidden size

    @classmethod
    def of(cls, form: Form, routes: Routes, num_experts: int, hidden: int, inter: int, shared: int) -> "Room":
        """`shared`: the shared experts' intermediate size, in those of an expert."""
        tokens, slots = routes.weights_TK.shape
        most = most_tiles(tokens * slots, num_experts, form.rows)
        tiles = -(-tokens // form.rows)
        pieces = most * max(inter // 128, -(-hidden // OUTPUTS))
        with_shared = tokens if shared else 0
        return cls(most, (most + tiles * shared) * form.rows, pieces, tokens * slots + with_shared)


def terms_of(out: torch.Tensor, routes: Routes) -> Terms:
    """The rows of the output, pairs, then tokens if there are shared experts, as terms to be added."""
    tokens, slots = routes.weights_TK.shape
    parts_TKD, shared_TD = out[: tokens * slots].view(tokens, slots, -1), out[tokens * slots :]
    return Terms(parts_TKD, shared_TD if len(shared_TD) else None)
