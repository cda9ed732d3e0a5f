"""Programmatic dependent launch: a kernel is made ready while the one before it still runs, and waits on the device.

A kernel that is launched so waits with `gdc_wait` for the one before it, and only then lets the next one be made ready.
That hides a launch's microsecond where a step is a chain of short kernels. Beside the long kernels of a prefill, what
waits only takes room: measured, 3% of its time.

A norm lets the next one be made ready first of all: what follows a norm multiplies by weights, as many of which as it
has room for it reads while the norm still waits.

Before its wait a kernel writes nothing but its own counter, which was set to zero two kernels before (the experts'
second product: lists.py), and reads only
- weights;
- the step's plan: positions, places, contexts and their running sums. Between what writes these and the first layer
  lies an ordinary launch, the embedding's, which nothing passes;
- rows of the cache that earlier steps wrote: pages that a step writes are read by others from the next step on
  (nmoe/scheduler/scheduler.py);
- past the multiprocessor's own cache (`.cg`), what a kernel before the last one has written, where the last one is no
  norm: it was let go by its own wait, so those before it have ended.
Whoever calls such a kernel by itself sees to it that its weights and its plan were not written by the kernel before.
"""

_MOST = 512  # tokens


def early(tokens: int) -> bool:
    """`launch_pdl` of a kernel over so many tokens."""
    return tokens <= _MOST
