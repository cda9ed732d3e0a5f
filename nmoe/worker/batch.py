"""The tensors of one step as the model sees them.

Shape suffixes: T tokens of the step, R rows (one per request in the step), P pages per row (padded), L layers,
N pages of the pool, S slots of a page, C the cache row: the normalised latent and the roped key, K experts per token.
"""

import dataclasses

import torch

from nmoe.worker.chunks import Chunks


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """One step's rows, concatenated: decode rows (one token each) first, then prefill chunks.

    Row r's tokens are `ids_T[starts[r] : starts[r + 1]]`; it attends to its first `contexts[r]` positions, the last of
    which is its own last token. `write_T` is where each token's cache row is written, as `page * page_size + offset`; a
    token that must not be written (already in a shared page, or padding) points into the reserved page. Integers are
    int32 or int64.

    A captured step serves any rows that fit, so what the host would know is on the device instead: `starts` and
    `contexts` are empty, `decodes_R` holds the decode rows' positions and `chunks` the other rows. Any of the first
    `num_decodes` rows may then not be a decode row; its chunk overwrites what attention computes for it.
    """

    ids_T: torch.Tensor  # [T]
    positions_T: torch.Tensor  # [T]
    write_T: torch.Tensor  # [T]
    starts: list[int]  # [R + 1]
    contexts: list[int]  # [R], tokens
    pages_RP: torch.Tensor  # [R, P]; entries past a row's context are undefined
    num_decodes: int  # rows [0, num_decodes) have one token each
    decodes_R: torch.Tensor | None = None  # int32 [num_decodes]
    chunks: Chunks | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class KVCache:
    """The paged MLA cache of one rank.

    Page `num_pages` (the last) is reserved: padding is written there, and nothing reads it.
    """

    rows_LNSC: torch.Tensor  # model dtype [L, num_pages + 1, page_size, kv_lora_rank + qk_rope_head_dim]
    # uint8 or int16 [num_pages + 1, page_size, layers with experts, K]: which experts each position chose; None if
    # nobody needs them, as in tests of the model alone
    routing_NSLK: torch.Tensor | None = None

    @property
    def num_pages(self) -> int:
        """Pages that requests can own."""
        return self.rows_LNSC.shape[1] - 1

    @property
    def page_size(self) -> int:
        """Tokens per page."""
        return self.rows_LNSC.shape[2]
