"""Flags between GPUs: raising them, waiting for them, and giving up on a rank that stays silent. `signals.py` does the
same on the CPU, and its invariants hold here.

Flags are int64 epochs in the slabs' lines, stored with release and loaded with acquire at system scope. A rank's
epochs, one per channel, are words of its device memory that its kernels advance, so that a graph can be replayed.
What ranks tell each other when a wait gets long (what they wait for, who was silent) is in host memory shared by all
GPUs and hosts (`ControlLayout`), so a host can see a step's fate without asking its GPU and end a wait with a store.

Every warp waits on its own, so that no loop whose exit depends on what a warp has seen contains a barrier. Scalars are
stored by the first warp only, so that warp gives up on behalf of all: if it has not, the flags are there.
"""

import triton
import triton.language as tl

from nmoe.slab import COUNT_BITS, LINE, POISON_BITS

# int64 words of a rank's device state; the channels' epochs come first
EPOCHS = 0
PUSHED = 2  # dispatch programs that have finished
RETURNED = 3  # return programs that have finished
GAVE_UP = 4  # the life in which this rank no longer waits
BOUND_NS = 5
STATE_WORDS = 6

_LINE = tl.constexpr(LINE)
_COUNT_BITS = tl.constexpr(COUNT_BITS)
_POISON_BITS = tl.constexpr(POISON_BITS)
_GAVE_UP = tl.constexpr(GAVE_UP)
_BOUND_NS = tl.constexpr(BOUND_NS)
_SLICE_NS = tl.constexpr(20_000)  # between checks of the time limit and of the poison words
_COMPILES_NS = tl.constexpr(600_000_000_000)  # how long a rank is believed to be compiling

# Whether all flags in the lines from $1 on reach $2 within $3 ns; $4 is the last line. A warp's lanes agree.
_SPIN = tl.constexpr("""
{
    .reg .u32 lane, result;
    .reg .u64 line, now, end;
    .reg .s64 epoch;
    .reg .pred raised, late;
    mov.u32 lane, %laneid;
    min.u32 lane, lane, $4;
    mul.wide.u32 line, lane, 64;
    add.u64 line, line, $1;
    mov.u64 end, %globaltimer;
    add.u64 end, end, $3;
again:
    ld.acquire.sys.global.s64 epoch, [line];
    setp.ge.s64 raised, epoch, $2;
    vote.sync.all.pred raised, raised, 0xffffffff;
    @raised bra done;
    mov.u64 now, %globaltimer;
    setp.gt.u64 late, now, end;
    vote.sync.any.pred late, late, 0xffffffff;
    @!late bra again;
done:
    selp.u32 result, 1, 0, raised;
    mov.u32 $0, result;
}
""")
# Thread n of the first $4 stores the epoch $2 at offset $3 in the slab whose address is the n-th at $1.
_RAISE = tl.constexpr("""
{
    .reg .u32 thread;
    .reg .u64 line;
    .reg .pred mine;
    mov.u32 thread, %tid.x;
    setp.lt.u32 mine, thread, $4;
    mul.wide.u32 line, thread, 8;
    add.u64 line, line, $1;
    @mine ld.global.u64 line, [line];
    add.u64 line, line, $3;
    @mine st.release.sys.global.s64 [line], $2;
    mov.u32 $0, 0;
}
""")
_FENCE = tl.constexpr("fence.acq_rel.sys; mov.u32 $0, 0;")


@triton.jit
def fence():
    """Order every thread's earlier reads and writes before its later ones, for every GPU and host."""
    tl.inline_asm_elementwise(_FENCE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _spin(lines, epoch, RANKS: tl.constexpr):
    last = lines * 0 + (RANKS - 1)
    slice_ns = lines * 0 + _SLICE_NS
    return tl.inline_asm_elementwise(
        _SPIN, "=r,l,l,l,r", [lines, epoch, slice_ns, last.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _raise(bases_ptr, epoch, line, RANKS: tl.constexpr):
    ranks = line * 0 + RANKS
    tl.inline_asm_elementwise(
        _RAISE, "=r,l,l,l,r", [bases_ptr, epoch, line, ranks.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def word_at(address):
    """The int64 at an address that another processor may write to at any time."""
    return tl.load(address.to(tl.pointer_type(tl.int64)), volatile=True)


@triton.jit
def _awaited_at(control, rank):
    return control + rank * (3 * _LINE) + _LINE


@triton.jit
def _poison_at(control, rank):
    return control + rank * (3 * _LINE) + 2 * _LINE


@triton.jit
def _missing(slab, control, rank, life, RANKS: tl.constexpr):
    """The ranks whose flags `rank` is waiting for, one bit each, judging by the flags this rank has received."""
    awaited = word_at(_awaited_at(control, rank))
    epoch = awaited >> 2
    missing = life * 0
    if (epoch >> _COUNT_BITS) == life:
        lines = slab + (awaited & 3) * (RANKS * _LINE)
        for peer in range(RANKS):
            missing |= (word_at(lines + peer * _LINE) < epoch).to(tl.int64) << peer
    return missing


@triton.jit
def _silent(slab, control, rank, life, RANKS: tl.constexpr):
    """The ranks to blame, one bit each: following waits transitively from this rank, those that wait for nobody. 0 if
    the last flag has just arrived."""
    one = life * 0 + 1
    found = one << rank
    seen = one << rank
    silent = life * 0
    for _ in range(RANKS):
        for peer in range(RANKS):
            if (found >> peer) & 1 == 1:
                missing = _missing(slab, control, peer, life, RANKS)
                found = (found & ~(one << peer)) | (missing & ~seen)
                seen |= missing
                silent |= (missing == 0).to(tl.int64) << peer
    silent &= ~(one << rank)
    mine = _missing(slab, control, rank, life, RANKS)
    return tl.where(mine == 0, mine, tl.where(silent == 0, mine, silent))


@triton.jit
def _poisoned(control, rank, life, RANKS: tl.constexpr):
    """The ranks whose silence poisoned this rank, one bit each; -1 if it is not poisoned."""
    blamed = life * 0
    found = life * 0
    for peer in range(RANKS):
        word = word_at(_poison_at(control, rank) + peer * 8)
        if (word >> _POISON_BITS) == life:
            found = found | 1
            blamed |= word & ((1 << _POISON_BITS) - 1)
    return tl.where(found == 1, blamed, found - 1)


@triton.jit
def _compiling(control, ranks, RANKS: tl.constexpr):
    """Whether any of these ranks, one bit each, is compiling a kernel."""
    compiling = ranks * 0
    for peer in range(RANKS):
        if (ranks >> peer) & 1 == 1:
            compiling |= word_at(control + peer * (3 * _LINE) + 8)
    return compiling != 0


@triton.jit
def _wait_long(state_ptr, slab, control, kind, epoch, life, rank, RANKS: tl.constexpr):
    """Keep waiting. Poisons every rank before it abandons the wait."""
    lines = slab + kind * (RANKS * _LINE)
    awaited = (epoch << 2) + kind
    tl.store(_awaited_at(control, rank).to(tl.pointer_type(tl.int64)), awaited)
    bound = tl.load(state_ptr + _BOUND_NS)
    end = tl.extra.cuda.globaltimer() + bound
    last = end + _COMPILES_NS
    waiting = rank * 0 + 1
    while waiting == 1:
        if _spin(lines, epoch, RANKS) == 1:
            waiting = rank * 0
        else:
            blamed = _poisoned(control, rank, life, RANKS)
            give_up = blamed >= 0
            now = tl.extra.cuda.globaltimer()
            if (blamed < 0) & (now > end):
                blamed = _silent(slab, control, rank, life, RANKS)
                give_up = blamed > 0
                if give_up & (now < last) & _compiling(control, blamed, RANKS):
                    give_up = now > last
                    end = now + bound
            if give_up:
                for peer in range(RANKS):
                    word_ptr = (_poison_at(control, peer) + rank * 8).to(tl.pointer_type(tl.int64))
                    tl.store(word_ptr, (life << _POISON_BITS) | blamed)
                fence()
                tl.store(state_ptr + _GAVE_UP, life)
                waiting = rank * 0


@triton.jit
def wait(state_ptr, slab, control, rank, channel, PHASE: tl.constexpr, RANKS: tl.constexpr):
    """Wait until every rank has raised its flag for this exchange, or this life is poisoned.

    `slab` and `control` are addresses. Afterwards every thread may read the data that the flags announce.
    """
    epoch = tl.load(state_ptr + channel)
    life = epoch >> _COUNT_BITS
    kind = channel * 2 + PHASE
    if tl.load(state_ptr + _GAVE_UP) != life:
        if _spin(slab + kind * (RANKS * _LINE), epoch, RANKS) == 0:
            _wait_long(state_ptr, slab, control, kind, epoch, life, rank, RANKS)
    tl.debug_barrier()


@triton.jit
def flag_at(channel, rank, PHASE: tl.constexpr, RANKS: tl.constexpr):
    """The byte offset of `rank`'s line in a slab."""
    return ((channel * 2 + PHASE) * RANKS + rank).to(tl.int64) * _LINE


@triton.jit
def raise_flags(state_ptr, bases_ptr, rank, channel, COUNTER: tl.constexpr, PHASE: tl.constexpr, RANKS: tl.constexpr):
    """Called by every program of the grid. The last one, for which it returns true, tells every rank, this one too,
    that all programs have written their data. For a dispatch, it first numbers a new exchange.

    No program needs a system-wide fence of its own: the release below covers everything its thread has observed,
    which through the barrier and the counter is all that any program wrote (docs/rdep.md, "Memory order").
    """
    epoch = tl.load(state_ptr + channel)
    counter_ptr = state_ptr + COUNTER
    one = epoch * 0 + 1
    tl.debug_barrier()
    last = tl.atomic_add(counter_ptr, one, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, one * 0)
        if PHASE == 0:
            epoch += 1
            tl.store(state_ptr + channel, epoch)
        _raise(bases_ptr, epoch, flag_at(channel, rank, PHASE, RANKS), RANKS)
    return last
