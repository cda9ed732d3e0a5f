"""Turns what the host says about a step's rows into the model's per-token inputs, using the device's own tables.

Shape suffixes: T tokens, R rows, S slots, P pages of a slot. There is one row more than R, the padding's, which gets
all tokens that no other row does.
"""

import torch


def locate(
    ids_T: torch.Tensor,
    slots_R: torch.Tensor,
    firsts_R: torch.Tensor,
    floors_R: torch.Tensor,
    starts_R: torch.Tensor,
    continued_1: torch.Tensor,
    last_S: torch.Tensor,
    pages_SP: torch.Tensor,
    page_size: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, positions and cache places (page * page_size + offset) of the tokens, each int32 [T].

    Row r has the tokens from `starts_R[r]` to `starts_R[r + 1]` and starts at position `firsts_R[r]`; there are R + 1
    rows and one more start. Positions below `floors_R[r]` go to the reserved page, the first one of the last slot. The
    first `continued_1` tokens are their slots' last tokens, the others are from `ids_T`. All int32.
    """
    token_T = torch.arange(len(ids_T), dtype=torch.int32, device=ids_T.device)
    row_T = torch.searchsorted(starts_R[1:-1], token_T, right=True)
    slot_T = slots_R[row_T]
    position_T = (firsts_R[row_T] + token_T - starts_R[row_T]).clamp_min_(0)
    page_T = torch.where(position_T < floors_R[row_T], pages_SP[-1, 0], pages_SP[slot_T, position_T // page_size])
    return (
        torch.where(token_T < continued_1, last_S[slot_T], ids_T),
        position_T,
        page_T * page_size + position_T % page_size,
    )


def rows_of_table(slots_R: torch.Tensor, pages_SP: torch.Tensor) -> torch.Tensor:
    """The slots' rows of the page table, int32 [R, P]."""
    return pages_SP[slots_R]
