"""The routed experts' weights, laid out for their kernels.

On the GPU they are stored in the order in which programs read them. A program of either product computes a group of
outputs, 256 if possible, and takes 128 bytes of their inputs at a time: these are contiguous, and follow one another.
In the first product's weights, gate and up, half of a group are outputs of gate and the other half the same outputs of
up. The memory then reads 32 KiB after 32 KiB instead of a line from each of 256 rows. benchmarks/LOG.md has the gain.
On the CPU weights are stored as they are.

Shape suffixes: E experts, O outputs, I inputs; G groups of P outputs, C blocks of Q inputs.
"""

from typing import NamedTuple

import torch

from nmoe.worker.kernels.fp8 import BlockFP8, Weight, empty_weight, rows_of

TILE = 64  # outputs that the kernels load at a time
_BYTES = 128  # of a block of inputs


class ExpertSizes(NamedTuple):
    """Of the second product's weights."""

    experts: int
    hidden: int
    intermediate: int


def empty_experts(like: torch.Tensor, num_experts: int, outputs: int, inputs: int, *, fp8: bool) -> Weight:
    """Allocate several experts' weights on `like`'s device, in `like`'s dtype or quantised, for `put_expert` to fill:
    [E, O, I], or on a GPU [E, G, C, P, Q]. There O is a multiple of 128."""
    weights = empty_weight(like, num_experts, outputs, inputs, fp8=fp8)
    return in_groups(weights) if like.is_cuda else weights


def put_expert(weights: Weight, expert: int, weight: Weight, *, halves: bool) -> None:
    """Store one expert's weight [O, I] in what `empty_experts` allocated. `halves`: it is gate above up."""
    to, values = rows_of(weights)[expert], rows_of(weight)
    grouped = to.dim() == 4
    if grouped:
        size = to.shape[2]
        values = _grouped(_alternating(values, size // 2) if halves else values, size)
    to.copy_(values)
    if isinstance(weights, BlockFP8):
        assert isinstance(weight, BlockFP8)
        weights.scales[expert] = _alternating(weight.scales, 1) if halves and grouped else weight.scales


def in_groups(weights_EOI: Weight) -> Weight:
    """The same memory with the shape of groups, whatever is stored there."""
    if isinstance(weights_EOI, BlockFP8):
        return BlockFP8(_in_groups(weights_EOI.values), weights_EOI.scales)
    return _in_groups(weights_EOI)


def _in_groups(weights_EOI: torch.Tensor) -> torch.Tensor:
    return weights_EOI.view(_grouped(weights_EOI, 256 if weights_EOI.shape[1] % 256 == 0 else 128).shape)


def _grouped(weight_OI: torch.Tensor, size: int) -> torch.Tensor:
    """A view of a weight, [..., O, I], in groups of `size` outputs, [..., G, C, P, Q]; not contiguous."""
    *front, outputs, inputs = weight_OI.shape
    block = _BYTES // weight_OI.itemsize
    return weight_OI.reshape(*front, outputs // size, size, inputs // block, block).transpose(-3, -2)


def _alternating(weight_OI: torch.Tensor, rows: int) -> torch.Tensor:
    """Rows of the first half and rows of the second half in turns, `rows` of each."""
    return weight_OI.reshape(2, -1, rows, weight_OI.shape[1]).transpose(0, 1).reshape(weight_OI.shape)


def experts_sizes(w_down_EGCPQ: torch.Tensor) -> ExpertSizes:
    """From the second product's weights."""
    experts, groups, blocks, of_group, of_block = w_down_EGCPQ.shape
    return ExpertSizes(experts, groups * of_group, blocks * of_block)


def stored_rows(weights_EGCPQ: torch.Tensor) -> torch.Tensor:
    """As rows of 128 bytes in the order of memory, [E * G * C * P, Q]: descriptors copy TILE of them."""
    return weights_EGCPQ.flatten(0, 3)
