"""What the CUDA engine's kernels support. The doctor reports it before a GPU is touched; a worker enforces it.

Blackwell (sm_100) lacks the matrix instructions used by `mla_warps_gluon.py`, `mla_decode_gluon.py`,
`mla_values_gluon.py`, `mla_values_many_gluon.py`, `mla_absorb_gluon.py`, `fp8_gluon.py`, `experts_gluon.py` and
`experts_fp8_gluon.py` in `worker/kernels/`. It needs versions of them built on its own instructions (tcgen05,
accumulators in tensor memory), selected by capability in `absorbed_decode`, `enter`, `values_of_latents`,
`exact_prefill`, `grouped_mlp`, and in fp8_triton.py's `linear` and `linear_exact`. cuBLAS's product there, with scales
per 1 x 128 and 128 x 128, is also specific to Hopper. The other sources compile for Blackwell.
"""

from collections.abc import Iterator

from nmoe.architecture import Architecture

_HOPPER = (9, 0)
FP8_BLOCK = 128  # rows and columns that share a scale


def refusals(architecture: Architecture, dtype: str, page_size: int, capability: tuple[int, int]) -> list[str]:
    """Every reason why this model, computed in `dtype`, cannot run on a GPU of this compute capability."""
    reasons = []
    if capability != _HOPPER:
        reasons.append(f"compute capability {capability[0]}.{capability[1]}: needs 9.0 (H100, H200)")
    if dtype != "bfloat16":
        reasons.append(f"{dtype}: computes in bfloat16; set [model] dtype = 'bfloat16'")
    # Attention weighs a tile of positions of one page at a time: 32 with 16 heads, 64 with more.
    pages = [size for size in (32, 64, 128, 256) if size > 32 or architecture.num_heads == 16]
    if page_size not in pages:
        accepted = f"{', '.join(map(str, pages[:-1]))} or {pages[-1]}"
        reasons.append(f"pages of {page_size} tokens: set [engine] page_size to {accepted}")
    return [*reasons, *_sizes(architecture), *_fp8_sizes(architecture)]


def _sizes(a: Architecture) -> Iterator[str]:
    for name, power, least, most in (
        ("kv_lora_rank", a.kv_lora_rank, 128, 512),
        ("qk_rope_head_dim", a.qk_rope_head_dim, 32, 64),
        ("qk_nope_head_dim", a.qk_nope_head_dim, 32, 256),
        ("v_head_dim", a.v_head_dim, 32, 1024),
    ):
        if not least <= power <= most or power & (power - 1):
            yield f"{name} = {power}: must be a power of two from {least} to {most}"
    for name, value, multiple in (
        ("hidden_size", a.hidden_size, 128),
        ("moe_intermediate_size", a.moe_intermediate_size, 64),
        ("intermediate_size", a.intermediate_size, 8),  # exact products load rows in units of 16 bytes
        ("q_lora_rank", a.q_lora_rank or 0, 8),
    ):
        if value % multiple:
            yield f"{name} = {value}: must be a multiple of {multiple}"
    if not a.num_shared_experts:
        yield "n_shared_experts = 0: must be at least 1"
    if a.num_heads != 16 and a.num_heads % 64:
        yield f"num_attention_heads = {a.num_heads}: must be 16 or a multiple of 64"
    if a.n_group > 1 and (a.num_experts & (a.num_experts - 1) or a.n_group & (a.n_group - 1)):
        yield f"{a.num_experts} experts in {a.n_group} groups: both must be powers of two"


def _fp8_sizes(a: Architecture) -> Iterator[str]:
    if not a.quant_block:
        return
    if a.quant_block != (FP8_BLOCK, FP8_BLOCK):
        yield f"weight_block_size = {list(a.quant_block)}: FP8 weights need {[FP8_BLOCK, FP8_BLOCK]}"
    for name, size in (
        ("hidden_size", a.hidden_size),
        ("moe_intermediate_size", a.moe_intermediate_size),
        ("intermediate_size", a.intermediate_size),
        ("q_lora_rank", a.q_lora_rank or a.num_heads * a.qk_head_dim),
        ("num_attention_heads x v_head_dim", a.num_heads * a.v_head_dim),
    ):
        if size % FP8_BLOCK:
            yield f"{name} = {size}: FP8 needs a multiple of {FP8_BLOCK}"
    if a.rope.interleave and (a.qk_rope_head_dim != 64 or a.qk_nope_head_dim % 64):
        yield "FP8 with interleaved rope needs qk_rope_head_dim = 64 and qk_nope_head_dim a multiple of it"
