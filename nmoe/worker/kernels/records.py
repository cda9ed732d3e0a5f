"""The contents of a token's record (nmoe/outputs.py), from the logits it was chosen or scored by.

Shape suffixes: S rows of logits, N records, V vocabulary, C ids whose log-probabilities are wanted, of which the first
K are the likeliest, W = 3 + K + C words of a record.

No record depends on another: each row is summed on its own.
"""

import numpy as np
import torch

from nmoe.worker.sampler import largest

HEAD = 3  # log-probability, log-probability as drawn, rank
_TILE = 1 << 24  # keys that exist at a time


def likeliest(logits_SV: torch.Tensor, rows_N: torch.Tensor, count: int) -> torch.Tensor:
    """The ids of the `count` largest logits of each of these rows, int64 [N, K]; ties go to the lower id. NaN is the
    largest."""
    ids_NK = torch.empty(len(rows_N), count, dtype=torch.int64, device=logits_SV.device)
    size = max(1, _TILE // logits_SV.shape[1])
    for begin in range(0, len(rows_N), size):
        rows, out = rows_N[begin : begin + size], ids_NK[begin : begin + size]
        logits = logits_SV[rows].float() + 0.0  # -0.0 becomes 0.0
        bits = logits.view(torch.int32)
        ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill_(logits.isnan(), 0x7FFFFFFF).long()
        out.copy_(largest(ordered, count)[1])
    return ids_NK


def records(
    logits_SV: torch.Tensor,
    rows_N: torch.Tensor,
    tokens_N: torch.Tensor,
    drawn_N: torch.Tensor | float,
    ids_NC: torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """The words of each token's record, int32 [N, W]: the head, the first K ids, the log-probabilities of all ids.

    Record n is for token `tokens_N[n]` under the logits of row `rows_N[n]`. `drawn_N`, float32 or one number for all,
    is passed through. Logits that are not finite (nmoe/worker/sampler.py) have no log-probabilities, only NaN; the
    token there may be NO_TOKEN.
    """
    words_NW = torch.empty(len(rows_N), HEAD + top_k + ids_NC.shape[1], dtype=torch.int32)
    floats_NW = words_NW.view(torch.float32)
    floats_NW[:, 1] = drawn_N
    words_NW[:, HEAD : HEAD + top_k] = ids_NC[:, :top_k]
    logits, tokens, ids = logits_SV.float().numpy(), tokens_N.numpy(), ids_NC.numpy()
    words, floats = words_NW.numpy(), floats_NW.numpy()
    for n, row in enumerate(rows_N.tolist()):
        peak = logits[row].max()
        shifted_V = logits[row] - (peak if np.isfinite(peak) else np.nan)
        log_sum = np.log(np.exp(shifted_V).sum(dtype=np.float64))
        floats[n, 0] = shifted_V[tokens[n]] - log_sum
        words[n, 2] = np.count_nonzero(logits[row] > logits[row, tokens[n]]) + 1  # shifting may make some equal
        floats[n, HEAD + top_k :] = shifted_V[ids[n]] - log_sum
    return words_NW


def make_records(
    logits_SV: torch.Tensor,
    rows_N: torch.Tensor,
    tokens_N: torch.Tensor,
    drawn_N: torch.Tensor | float,
    top_k: int,
    scored_NI: torch.Tensor,
) -> torch.Tensor:
    """The records of these tokens, as `records` gives them, with the K likeliest and the ids `scored_NI`, int64."""
    choose, make = likeliest, records
    if logits_SV.is_cuda:
        from nmoe.worker.kernels import likeliest_triton, records_triton

        choose, make = likeliest_triton.likeliest, records_triton.records
    ids_NC = torch.cat((choose(logits_SV, rows_N, top_k), scored_NI), 1) if top_k else scored_NI
    return make(logits_SV, rows_N, tokens_N, drawn_N, ids_NC, top_k)
