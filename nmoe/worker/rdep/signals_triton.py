"""Flags between GPUs: raising them, waiting for them, and giving up on a rank that stays silent. `signals.py` says the
same for the CPU, and its invariants hold here.

Flags are int64 epochs in the slabs' lines, stored with release and loaded with acquire at system scope. A rank's
epochs, one per channel, are words of its device memory that its kernels advance, so that a graph can be replayed.
What ranks tell each other when a wait gets long (what they wait for, who was silent) lies in host memory that all GPUs
and hosts share (`ControlLayout`): a host then sees a step's fate without asking its GPU, and ends a wait by a store.

Every warp waits by itself, so that no barrier stands in a loop whose end depends on what a warp has seen. Scalars are
stored by the first warp alone, so it is the first that gives up for all: when it has not, the flags are there.
"""

import triton
import triton.language as tl

from nmoe.slab import COUNT_BITS, LINE, POISON_BITS

# int64 words of a rank's device state; the epochs of the channels come first
EPOCHS = 0
PUSHED = 2  # programs of the dispatch that are done
RETURNED = 3  # programs of the return that are done
GAVE_UP = 4  # the life in which nothing is waited for any more
BOUND_NS = 5
STATE_WORDS = 6

_LINE = tl.constexpr(LINE)
_COUNT_BITS = tl.constexpr(COUNT_BITS)
_POISON_BITS = tl.constexpr(POISON_BITS)
_GAVE_UP = tl.constexpr(GAVE_UP)
_BOUND_NS = tl.constexpr(BOUND_NS)
_SLICE_NS = tl.constexpr(20_000)  # between looks at the clock's bound and at the poison words
_COMPILES_NS = tl.constexpr(600_000_000_000)  # how long a rank is believed that it compiles a kernel

# Whether all flags in the lines from $1 on are at least $2, within $3 ns; $4 is the last line. A warp's lanes agree.
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
# Thread n of the first $4 stores the epoch $2 at $3 in the slab whose address is the n-th at $1.
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
    """Order what every thread has read and written before what it will, for every GPU and host."""
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
    """The int64 at an address, which another processor may write at any time."""
    return tl.load(address.to(tl.pointer_type(tl.int64)), volatile=True)


@triton.jit
def _awaited_at(control, rank):
    return control + rank * (3 * _LINE) + _LINE


@triton.jit
def _poison_at(control, rank):
    return control + rank * (3 * _LINE) + 2 * _LINE


@triton.jit
def _missing(slab, control, rank, life, RANKS: tl.constexpr):
    """The ranks whose flags `rank` waits for, a bit each; judged by the flags that this rank has got."""
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
    """Who is to blame, a bit per rank: of those that are waited for, and those they wait for in turn, the ones that
    wait for nobody. 0 if the last flag has just come."""
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
    """Whose silence poisoned this rank, a bit per rank; -1 if nothing did."""
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
    """Whether one of these ranks, a bit each, compiles a kernel."""
    compiling = ranks * 0
    for peer in range(RANKS):
        if (ranks >> peer) & 1 == 1:
            compiling |= word_at(control + peer * (3 * _LINE) + 8)
    return compiling != 0


@triton.jit
def _wait_long(state_ptr, slab, control, kind, epoch, life, rank, RANKS: tl.constexpr):
    """The wait goes on. Nobody goes past it in vain before it has poisoned every rank."""
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
    """Until every rank has raised its flag for this exchange or, once this life is poisoned, not any longer.

    `slab` and `control` are addresses. What the flags announce may be read by every thread afterwards.
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
    """Where in a slab the line of `rank` lies, in bytes."""
    return ((channel * 2 + PHASE) * RANKS + rank).to(tl.int64) * _LINE


@triton.jit
def raise_flags(state_ptr, bases_ptr, rank, channel, COUNTER: tl.constexpr, PHASE: tl.constexpr, RANKS: tl.constexpr):
    """The last of the grid's programs to come here, which hears so, tells every rank, this one included, that all wrote
    what they had to. With a dispatch it numbers a new exchange first.

    Nobody passes a fence of his own for the whole system: the release below covers all that its thread knows of, and by
    the barrier and the count that is what every thread of every program wrote (docs/rdep.md, "Memory order").
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
