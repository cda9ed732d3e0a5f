"""Programmatic dependent launch: a kernel is launched while its predecessor still runs, and waits on the device.

Such a kernel waits for its predecessor with `gdc_wait`, and only then lets its successor launch. That hides a launch's
microsecond where a step is a chain of short kernels. Next to the long kernels of a prefill, waiting kernels only take
up room: measured, 3% of its time.

A norm lets its successor launch first of all: the kernel after a norm multiplies by weights, and reads as many of them
as it has room for while the norm still waits. So does the kernel that chooses a token's experts: the experts' kernel
begins with the shared ones, whose inputs are what the norm before the router gave.

Before its wait a kernel writes nothing that others read. One writes at all then, the experts' kernel, results of the
shared experts between its products: to memory that the kernels still running, the router's, do not use, not even for
what Python has released by then (`Lists.logits_PTE`). Before its wait a kernel reads only
- weights;
- the step's plan: positions, places, contexts and their running sums. Between the kernels that write these and the
  first layer there is an ordinary launch, the embedding's, which nothing overtakes;
- cache rows written by earlier steps: pages that a step writes are read by others only from the next step on
  (nmoe/scheduler/scheduler.py);
- bypassing the multiprocessor's own cache (`.cg`), what kernels before its predecessor wrote: the predecessor let it
  launch after its own wait, so the kernels before that one have finished. Of a predecessor that lets it launch first of
  all, the same holds for one kernel earlier. (A row's scales in FP8, 4 bytes each, can be copied through that cache
  only; it is empty of them, as nobody there has read them since those kernels finished.)
The kernel that ropes many queries (mla_inputs_triton.py) runs beside its predecessor, which absorbs them, and does not
wait for it. The predecessor let it launch after its own wait, so the kernels before both have finished; and neither
writes what the other one reads or writes. It, too, lets its successor launch first of all. One of its programs waits at
its end, so that whoever waits for it has waited for both.
A caller that launches such a kernel by itself ensures that the kernel before wrote neither its weights nor its plan.
"""

_MOST = 512  # tokens


def early(tokens: int) -> bool:
    """`launch_pdl` for a kernel over this many tokens."""
    return tokens <= _MOST
