"""The values of attended latents on the GPU, W_UV c; `mla.py`'s `values_of_latents` is the reference. For few tokens,
see mla_values_gluon.py.

An element is added along the latent in one accumulator, whatever the tile: as found in linear_exact_triton.py, its bits
then depend on its row alone. The exact class uses this; decode rows of the fast class get their values from the parts
of their attention.

Shape suffixes: T tokens, H heads, L latent, V value dimensions.
"""

import torch
import triton
import triton.language as tl

from nmoe.worker.kernels.device import FEW_TOKENS
from nmoe.worker.kernels.early import early
from nmoe.worker.kernels.mla_values_gluon import values_of_few

_DEPTH = 128


@triton.jit(do_not_specialize=["tokens"])
def _values_kernel(
    x_ptr,
    w_ptr,
    out_ptr,
    tokens,
    x_token,
    x_head,
    out_token,
    W_HEAD: tl.constexpr,
    VALUES: tl.constexpr,
    LATENT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of one head."""
    head = tl.program_id(0).to(tl.int64)
    value = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    token = (tl.program_id(2) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    exists = (token < tokens)[:, None]
    lane = tl.arange(0, DEPTH)
    x_at = x_ptr + head * x_head + token[:, None] * x_token + lane[None, :]
    w_at = w_ptr + head * W_HEAD + value[None, :] * LATENT + lane[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    tl.extra.cuda.gdc_wait()
    tl.extra.cuda.gdc_launch_dependents()
    for k in tl.range(0, LATENT, DEPTH, num_stages=STAGES):
        acc = tl.dot(tl.load(x_at + k, mask=exists, other=0.0), tl.load(w_at + k), acc)
    out = out_ptr + token[:, None] * out_token + head * VALUES + value[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=exists)


def values_of_latents(latent_THL: torch.Tensor, w_uv_HVL: torch.Tensor, out_THV: torch.Tensor) -> None:
    """See mla.py; into `out_THV`, contiguous per token. L, a multiple of 128, is contiguous in both inputs."""
    (tokens, heads, latent), values = latent_THL.shape, w_uv_HVL.shape[1]
    if not tokens:
        return
    if tokens <= FEW_TOKENS:
        values_of_few(latent_THL, w_uv_HVL, out_THV)
        return
    rows = 64 if tokens <= 256 else 128
    columns = min(rows, values)
    _values_kernel[(heads, values // columns, triton.cdiv(tokens, rows))](
        latent_THL,
        w_uv_HVL,
        out_THV,
        tokens,
        latent_THL.stride(0),
        latent_THL.stride(1),
        out_THV.stride(0),
        W_HEAD=w_uv_HVL.stride(0),
        VALUES=values,
        LATENT=latent,
        ROWS=rows,
        COLUMNS=columns,
        DEPTH=_DEPTH,
        STAGES=4 if rows == 64 else 3,
        num_warps=8 if rows == 128 else 4,
        launch_pdl=early(tokens),
    )
