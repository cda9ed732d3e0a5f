"""Several ranks in one process on one GPU: slabs are ordinary memory, each rank's kernels run on streams of its own.

Only one thing differs from ranks on GPUs of their own: kernels that wait must leave room on the GPU for those they wait
for. So whatever waits is small, and every kernel is compiled and loaded (`warm_up`) before any rank waits: loading code
may wait for all that runs on a GPU.
"""

import threading

import msgspec
import torch

from nmoe.config import Config, Engine, Parallel
from nmoe.config_json import read_architecture
from nmoe.slab import ControlLayout, SlabLayout
from nmoe.worker.kernels.fp8_triton import quantise
from nmoe.worker.kernels.lists import Routes
from nmoe.worker.rdep.between_gpus import BetweenGPUs
from nmoe.worker.rdep.control import Control
from nmoe.worker.rdep.reference import exchange

GPU = torch.device("cuda")  # the current one
BF16 = torch.bfloat16


def make_layout(world_size, *, hidden=256, experts=32, top_k=4, decodes=24, prefill=160, quantised=False):
    """Slots for `decodes` and `prefill` + `decodes` tokens per rank."""
    architecture = msgspec.structs.replace(
        read_architecture("configs/models/moonlight.json"),
        hidden_size=hidden,
        num_experts=experts,
        num_experts_per_tok=top_k,
        quant_block=(128, 128) if quantised else None,
    )
    engine = Engine(max_batch_size=decodes, max_prefill_tokens=prefill * world_size)
    parallel = Parallel(world_size=world_size, device="cuda")
    return SlabLayout.of(architecture, "bfloat16", Config(parallel=parallel, engine=engine))


_pages = []  # of this process: the GPU knows them, so none may take the place of another


class Ranks:
    """The ends of an exchange, `links`, and a stream for each rank's own work."""

    def __init__(self, layout, bound_s=4.0):
        self.layout, ranks = layout, range(layout.world_size)
        page = ControlLayout(layout.world_size).make()
        _pages.append(page)
        control = Control(ControlLayout(layout.world_size), page)
        slabs = [torch.zeros(layout.slab_bytes, dtype=torch.uint8, device=GPU) for _ in ranks]
        bases = [slab.data_ptr() for slab in slabs]
        self.links = [
            BetweenGPUs(layout, slabs[rank], bases, control, rank, BF16, expected_rows=64, bound_s=bound_s)
            for rank in ranks
        ]
        self.streams = [torch.cuda.Stream(GPU) for _ in ranks]

    def meet(self, life, bounded=True):
        """All ranks begin a life, each in a thread, since it waits for the others."""
        done = []
        threads = [
            threading.Thread(target=lambda link=link: done.append(link.meet(life, lambda: False, bounded=bounded)))
            for link in self.links
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done == [True] * len(threads)

    def warm_up(self, run):
        """`run()` in a life that has ended, so that nothing waits."""
        self.meet(1)
        self.links[0].leave()
        run()
        torch.cuda.synchronize()
        self.meet(2)


def make_tokens(num_tokens, routing, seed, layout, world_size):
    """One rank's tokens: x_TD and their routes, on the GPU."""
    generator = torch.Generator().manual_seed(seed)
    experts = layout.num_experts * world_size
    scores = torch.rand(num_tokens, experts, generator=generator)
    if routing == "skewed":
        scores /= torch.arange(1, experts + 1)
    elif routing == "all to one":  # the last rank, at every world size
        scores[:, : experts - layout.top_k] -= 1
    x_TD = torch.randn(num_tokens, layout.row_bytes // 2, generator=generator).to(BF16)
    ids_TK = scores.topk(layout.top_k).indices.int()
    weights_TK = torch.rand(num_tokens, layout.top_k, generator=generator)
    return x_TD.to(GPU), Routes(ids_TK.to(GPU), weights_TK.to(GPU))


def listed_ids(routes):
    """The ids [S, K] that the lists tell of; where no expert has a pair, as many as there are experts."""
    pairs_EC, counts_EW = routes.lists.pairs_EC, routes.lists.counts_EW
    (experts, capacity), total = pairs_EC.shape, routes.ids_TK.numel()
    there_EC = torch.arange(capacity, device=GPU) < counts_EW[:experts, :1]
    place_EC = torch.where(there_EC, pairs_EC, total).long()
    expert_EC = torch.arange(experts, dtype=torch.int32, device=GPU)[:, None].expand_as(place_EC)
    ids = torch.full((total + 1,), experts, dtype=torch.int32, device=GPU)
    return ids.scatter(0, place_EC.flatten(), expert_EC.flatten())[:total].view_as(routes.ids_TK)


def terms(x_SD, ids_SK, weights_SK, rank):
    """In place of experts: what each makes of a row depends on the expert, its rank and the weight alone."""
    factors_SK = 1 + ids_SK.float() / 64 + rank
    return (x_SD.float()[:, None] * factors_SK[..., None] * weights_SK[..., None]).to(BF16)


def experts_of(rank):
    """A LocalExperts of `terms`, by the lists; of rows that do not exist it computes something, too."""

    def experts(arrived, routes):
        slots_S = arrived.slots_S.long().clamp(max=len(arrived.values_CD) - 1)
        x_SD = arrived.values_CD[slots_S]
        if arrived.scales_CG is not None:
            x_SD = x_SD.float() * arrived.scales_CG[slots_S].repeat_interleave(128, 1)
        return terms(x_SD, listed_ids(routes), routes.weights_TK, rank)

    return experts


def expected_sums(layout, ranks):
    """What reference.py says about the ranks' tokens, on the CPU; rows are quantised first if they travel so."""

    def local(rank):
        def experts(x_SD, routes):
            ids_SK, weights_SK, _ = routes
            parts_SKD = terms(x_SD, ids_SK, weights_SK, rank).float()
            sum_SD = torch.zeros(x_SD.shape)
            for k in range(ids_SK.shape[1]):
                here_S1 = ids_SK[:, k : k + 1] < layout.num_experts
                sum_SD = torch.where(here_S1, sum_SD + parts_SKD[:, k], sum_SD)
            return sum_SD.to(BF16)

        return experts

    tokens = []
    for x_TD, (ids_TK, weights_TK, _) in ranks:
        if layout.quantised:
            sent = quantise(x_TD)
            x_PD = sent.values_PI.float() * sent.scales_CP.t().repeat_interleave(128, 1)
            x_TD = x_PD[: len(x_TD)]
        tokens.append((x_TD.cpu(), Routes(ids_TK.cpu().long(), weights_TK.cpu())))
    return exchange([local(rank) for rank in range(len(ranks))], layout.num_experts, tokens)


def added(returned):
    """What a `Returned` comes to, float32 [T, D]."""
    sum_TD = torch.zeros(len(returned.owners_T), returned.sums_TND.shape[2], device=returned.owners_T.device)
    for rank, sent_TD in enumerate(returned.sums_TND.unbind(1)):
        there_T = returned.owners_T >> rank & 1
        sum_TD = torch.where(there_T[:, None] == 1, sum_TD + sent_TD.float(), sum_TD)
    return sum_TD
