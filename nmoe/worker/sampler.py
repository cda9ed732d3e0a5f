"""Batched sampling with integers: no row's result depends on its neighbours or on the order of sums.

Shape suffixes: S rows that sample, D those of them that draw (temperature > 0), F those of D with top-k or top-p, V the
vocabulary, K the longest list of candidates.

A row's probabilities become integer weights, `floor(exp((logit - max) / temperature) * 2**40)`, and one uniform number
per row picks a token by inverting their running sum. Integer sums are exact in any order, hence identical on every
device, in every batch and with every block size. Rounding down costs a token less than 2**-40 of the likeliest token's
probability; the logits' own float32 rounding is coarser.

A row whose largest logit is not finite (some logit is NaN or +inf, or all are -inf) has no such distribution: its token
is NO_TOKEN.

Filters apply in vLLM's order: temperature, min-p, then top-k, then top-p over what remains. min-p keeps the tokens
with at least that fraction of the likeliest token's probability. top-k keeps exactly k tokens; ties go to lower ids.
top-p keeps the shortest list of likeliest tokens whose probability reaches p, so always at least one.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ONE = 2.0**40  # the weight of a row's likeliest token
ID_BITS = 20  # a sort key is a weight, or another number, above a token id; 41 + 20 bits fit in an int64
NO_TOKEN = -1
COLDEST = 1e-6  # below this, sampling is effectively greedy; keeps 1 / temperature finite in float32

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How the S rows of a step sample. Built on the host once per set of rows; tensors are on the device."""

    drawn: Array  # int64 [D], on the host: which rows need a uniform number
    drawn_D: torch.Tensor  # int64 [D]
    has_greedy: bool  # whether D < S
    temperature_D1: torch.Tensor  # float32 [D, 1]
    least_D1: torch.Tensor | None  # int64 [D, 1]: the least weight that min-p keeps; None if no row has min-p
    filtered_F: torch.Tensor  # int64 [F], positions in D
    unfiltered_U: torch.Tensor  # int64 [D - F], the other positions in D
    num_candidates: int  # K: the largest top-k of the F rows, V when one of them has none
    top_k_F1: torch.Tensor  # int64 [F, 1], V where there is none
    top_p_F1: torch.Tensor  # K: the largest top-k of the F rows, V if one of them has none


def make_plan(
    temperature: Array, top_k: Array, top_p: Array, min_p: Array, vocab_size: int, device: torch.device
) -> Plan:
    """The plan for rows with these parameters (host arrays [S]; meanings as in `nmoe.messages.Sampling`)."""
    if vocab_size > 1 << ID_BITS:
        raise ValueError(f"a vocabulary of {vocab_size} does not fit in {ID_BITS} bits")

    def put(array: Array, dtype: torch.dtype) -> torch.Tensor:
        return torch.from_numpy(array).to(device, dtype)

    drawn = np.flatnonzero(temperature > 0)
    top_k, top_p, min_p = top_k[drawn], top_p[drawn], min_p[drawn]
    top_k = np.where((top_k <= 0) | (top_k > vocab_size), vocab_size, top_k)
    is_filtered = (top_k < vocab_size) | (top_p < 1)
    filtered = np.flatnonzero(is_filtered)
    top_k = top_k[filtered]
    return Plan(
        drawn=drawn,
        drawn_D=put(drawn, torch.int64),
        has_greedy=len(drawn) < len(temperature),
        temperature_D1=put(np.maximum(temperature[drawn], COLDEST), torch.float32)[:, None],
        least_D1=put(np.ceil(min_p * ONE), torch.int64)[:, None] if (min_p > 0).any() else None,
        filtered_F=put(filtered, torch.int64),
        unfiltered_U=put(np.flatnonzero(~is_filtered), torch.int64),
        num_candidates=int(top_k.max(initial=0)),
        top_k_F1=put(top_k, torch.int64)[:, None],
        top_p_F1=put(top_p[filtered], torch.float64)[:, None],
    )


def greedy(logits_SV: torch.Tensor) -> torch.Tensor:
    """The first of each row's largest logits, int64 [S]; NO_TOKEN if it is not finite."""
    # torch's argmax is scalar code on the CPU, ten times slower than numpy's; both treat NaN as the largest
    logits = logits_SV.numpy()
    tokens = logits.argmax(-1)
    tokens[~np.isfinite(logits[np.arange(len(tokens)), tokens])] = NO_TOKEN
    return torch.from_numpy(tokens)


def sample(
    logits_SV: torch.Tensor, plan: Plan, uniforms_D: torch.Tensor, logprobs_S: torch.Tensor | None = None
) -> torch.Tensor:
    """The next token of each row, int64 [S], from float32 logits and uniform numbers in [0, 1), float64 [D].

    `logprobs_S` float32, if given, is set to the tokens' log-probabilities under the distributions they are drawn from,
    0 in greedy rows.
    """
    logprobs_D = None if logprobs_S is None else torch.empty_like(plan.temperature_D1[:, 0])
    if plan.has_greedy:
        tokens_S = greedy(logits_SV)
        tokens_S[plan.drawn_D] = _draw(logits_SV[plan.drawn_D], plan, uniforms_D, logprobs_D)
    else:
        tokens_S = _draw(logits_SV, plan, uniforms_D, logprobs_D)
    if logprobs_S is not None and logprobs_D is not None:
        logprobs_S.zero_()[plan.drawn_D] = logprobs_D
    return tokens_S


def _draw(
    logits_DV: torch.Tensor, plan: Plan, uniforms_D: torch.Tensor, logprobs_D: torch.Tensor | None
) -> torch.Tensor:
    """The drawn tokens, int64 [D], and their log-probabilities if requested."""
    peaks_D1 = logits_DV.amax(-1, keepdim=True)
    tokens_D = _draw_weighted(_weights(logits_DV, peaks_D1, plan.temperature_D1), plan, uniforms_D, logprobs_D)
    return tokens_D.masked_fill_(~peaks_D1[:, 0].isfinite(), NO_TOKEN)


def _draw_weighted(
    weights_DV: torch.Tensor, plan: Plan, uniforms_D: torch.Tensor, logprobs_D: torch.Tensor | None
) -> torch.Tensor:
    """The drawn tokens by their unfiltered weights; arbitrary tokens where the weights are invalid."""
    if plan.least_D1 is not None:
        weights_DV.masked_fill_(weights_DV < plan.least_D1, 0)
    uniforms_D1 = uniforms_D[:, None]
    if not len(plan.filtered_F):
        return _draw_unfiltered(weights_DV, plan, uniforms_D1, logprobs_D)
    if not len(plan.unfiltered_U):
        return _draw_filtered(weights_DV, plan, uniforms_D1, logprobs_D)
    tokens_D = torch.empty_like(plan.drawn_D)
    for rows, draw in ((plan.unfiltered_U, _draw_unfiltered), (plan.filtered_F, _draw_filtered)):
        logprobs = None if logprobs_D is None else logprobs_D[rows]
        tokens_D[rows] = draw(weights_DV[rows], plan, uniforms_D1[rows], logprobs)
        if logprobs_D is not None and logprobs is not None:
            logprobs_D[rows] = logprobs
    return tokens_D


def _draw_unfiltered(
    weights_UV: torch.Tensor, plan: Plan, uniforms_U1: torch.Tensor, logprobs_U: torch.Tensor | None
) -> torch.Tensor:
    """The drawn tokens of the rows without top-k or top-p, int64 [U]."""
    return _pick(weights_UV, uniforms_U1, logprobs_U)[:, 0]


def _weights(logits_DV: torch.Tensor, peaks_D1: torch.Tensor, temperature_D1: torch.Tensor) -> torch.Tensor:
    """Integer weights in [0, 2**40], int64 [D, V]; the likeliest token of each row has exactly 2**40."""
    return (logits_DV - peaks_D1).div_(temperature_D1).exp_().mul_(ONE).to(torch.int64)


def _draw_filtered(
    weights_FV: torch.Tensor, plan: Plan, uniforms_F1: torch.Tensor, logprobs_F: torch.Tensor | None
) -> torch.Tensor:
    """The drawn tokens of the rows with top-k or top-p, int64 [F]."""
    weights_FK, ids_FK = largest(weights_FV, plan.num_candidates)
    rank_K = torch.arange(plan.num_candidates, device=weights_FV.device)
    weights_FK = weights_FK.masked_fill_(rank_K >= plan.top_k_F1, 0)
    sums_FK = weights_FK.cumsum(-1)
    enough_F1 = (sums_FK[:, -1:] * plan.top_p_F1).clamp_min_(1.0)
    before_FK = sums_FK - weights_FK
    weights_FK = weights_FK.masked_fill_(before_FK >= enough_F1, 0)
    # Weights are summed in id order, as without filters, so no other implementation needs to sort.
    return _pick(weights_FV.zero_().scatter_(1, ids_FK, weights_FK), uniforms_F1, logprobs_F)[:, 0]


def largest(values_NV: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` largest of each row, descending, and their token ids, int64 [N, K]; ties in id order. `values_NV` are
    int64 of at most 44 bits, sign included.

    One int64 key holds both, so keys are distinct and any selection algorithm gives the same list.
    """
    last = (1 << ID_BITS) - 1
    ids_V = torch.arange(values_NV.shape[1], device=values_NV.device)
    keys_NV = (values_NV << ID_BITS).add_(last - ids_V)
    keys_NK = keys_NV.topk(count).values
    return keys_NK >> ID_BITS, last - (keys_NK & last)


def _pick(weights_NV: torch.Tensor, uniforms_N1: torch.Tensor, logprobs_N: torch.Tensor | None) -> torch.Tensor:
    """Where `uniform` falls in the running sum of each row's weights, int64 [N, 1]; a zero weight is never hit.
    `logprobs_N`, if given, is set to the log of each picked weight's share of its row.

    A row with invalid weights, because its logits were not finite, gets an arbitrary place of its own. The weights are
    overwritten.
    """
    sums_NV = weights_NV.cumsum_(-1)
    total_N1 = sums_NV[:, -1:]
    target_N1 = torch.minimum((total_N1 * uniforms_N1).to(torch.int64), total_N1 - 1)
    picked_N1 = torch.searchsorted(sums_NV, target_N1, right=True).clamp_(max=sums_NV.shape[1] - 1)
    if logprobs_N is not None:
        before_N1 = sums_NV.gather(1, (picked_N1 - 1).clamp_(min=0)).masked_fill_(picked_N1 == 0, 0)
        weight_N1 = sums_NV.gather(1, picked_N1) - before_N1
        logprobs_N.copy_((weight_N1.double() / total_N1).log_()[:, 0])
    return picked_N1
