"""A step's tokens on the GPU, in one kernel; `step.py` is the reference.

Shape suffixes as in step.py.
"""

import torch
import triton
import triton.language as tl

_TOKENS = 32  # per program
_PAGES = 1024  # copied by a program at a time


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "max_pages", "nobody"])
def _step_kernel(
    given_ptr,
    slots_ptr,
    firsts_ptr,
    floors_ptr,
    starts_ptr,
    continued_ptr,
    last_ptr,
    table_ptr,
    ids_ptr,
    positions_ptr,
    places_ptr,
    pages_ptr,
    num_tokens,
    num_rows,
    max_pages,
    nobody,
    PAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """The first programs process a block of tokens each, the others a row of the page table."""
    blocks = tl.cdiv(num_tokens, BLOCK_T)
    if tl.program_id(0) < blocks:
        token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = token < num_tokens
        index = tl.arange(0, BLOCK_R)
        ends = tl.load(starts_ptr + 1 + index, mask=index < num_rows, other=2147483647)
        row = tl.sum((ends[None, :] <= token[:, None]).to(tl.int32), 1)
        slot = tl.load(slots_ptr + row, mask=inside, other=0).to(tl.int64)
        position = tl.load(firsts_ptr + row, mask=inside, other=0) + token
        position = tl.maximum(position - tl.load(starts_ptr + row, mask=inside, other=0), 0)
        floor = tl.load(floors_ptr + row, mask=inside, other=0)
        at = tl.where(position < floor, nobody.to(tl.int64) * max_pages, slot * max_pages + position // PAGE)
        page = tl.load(table_ptr + at, mask=inside, other=0)
        given = tl.load(given_ptr + token, mask=inside, other=0)
        last = tl.load(last_ptr + slot, mask=inside, other=0)
        tl.store(ids_ptr + token, tl.where(token < tl.load(continued_ptr), last, given), mask=inside)
        tl.store(positions_ptr + token, position, mask=inside)
        tl.store(places_ptr + token, page * PAGE + position % PAGE, mask=inside)
    else:
        copied = tl.program_id(0) - blocks
        from_ptr = table_ptr + tl.load(slots_ptr + copied).to(tl.int64) * max_pages
        to_ptr = pages_ptr + copied.to(tl.int64) * max_pages
        for start in range(0, max_pages, BLOCK_P):
            lane = start + tl.arange(0, BLOCK_P)
            tl.store(to_ptr + lane, tl.load(from_ptr + lane, mask=lane < max_pages), mask=lane < max_pages)


def locate_and_copy(
    ids_T: torch.Tensor,
    slots_R: torch.Tensor,
    firsts_R: torch.Tensor,
    floors_R: torch.Tensor,
    starts_R: torch.Tensor,
    continued_1: torch.Tensor,
    last_S: torch.Tensor,
    pages_SP: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`locate`'s three results, and `rows_of_table` for all rows but the padding's."""
    tokens, rows, (slots, max_pages) = len(ids_T), len(slots_R) - 1, pages_SP.shape
    ids, positions, places = (torch.empty_like(ids_T) for _ in range(3))
    pages_RP = pages_SP.new_empty(rows, max_pages)
    if tokens or rows:
        _step_kernel[(triton.cdiv(tokens, _TOKENS) + rows,)](
            ids_T,
            slots_R,
            firsts_R,
            floors_R,
            starts_R,
            continued_1,
            last_S,
            pages_SP,
            ids,
            positions,
            places,
            pages_RP,
            tokens,
            rows,
            max_pages,
            slots - 1,
            PAGE=page_size,
            BLOCK_T=_TOKENS,
            BLOCK_R=max(256, triton.next_power_of_2(rows)),
            BLOCK_P=_PAGES,
        )
    return ids, positions, places, pages_RP
