"""Slots, pages and batches of every rank, and the state changes of requests; the decisions are made elsewhere."""

from nmoe.messages import Admit
from nmoe.profiles import Lane
from nmoe.scheduler.batch import Batch
from nmoe.scheduler.cells import Cells
from nmoe.scheduler.draft import Draft
from nmoe.scheduler.limits import Limits
from nmoe.scheduler.pages import PagePool
from nmoe.scheduler.prefix import extend_keys
from nmoe.scheduler.request import ORDER, Request, State
from nmoe.scheduler.slots import SlotTable
from nmoe.scheduler.stats import Stats


class Ranks:
    """The state of all ranks.

    `running` counts a rank's requests with rows left to launch; it never exceeds max_batch_size. `news` grows whenever
    a rank may have gained room for some request: pages or batch room freed, pages inserted into the tree, a request
    stalled.
    """

    def __init__(self, limits: Limits, stats: Stats, cells: Cells) -> None:
        self._limits = limits
        self.table = SlotTable(limits.world_size, limits.num_slots)
        self.pools = [PagePool(limits.num_pages, stats) for _ in range(limits.world_size)]
        self.batches = {lane: Batch(self.table) for lane in Lane}
        self.no_rows = Batch(self.table)  # stands in for a batch that waits
        self.prefills: dict[Lane, list[Request]] = {lane: [] for lane in Lane}
        self.costly: dict[Lane, list[Request]] = {lane: [] for lane in Lane}  # decoding; each row takes a cell
        self.cells = cells
        self.running = [0] * limits.world_size
        self.news = [0] * limits.world_size
        self._residents = [0] * limits.world_size  # requests that hold pages

    def has_room(self, rank: int) -> bool:
        """Whether one more request may run on `rank`, ignoring pages."""
        return self.running[rank] < self._limits.max_batch_size and self.table.num_free(rank) > 0

    def pages_needed(self, request: Request) -> int:
        """The pages a request starts with: for its known tokens, plus what its first row may write beyond them."""
        return self._limits.pages(min(request.known_len + self._limits.lookahead, request.last_computed))

    def admit(self, request: Request, rank: int, cached: int, draft: Draft) -> None:
        """Place a waiting request on `rank`, where the pages of its first `cached` keys are in the tree."""
        pool = self.pools[rank]
        covered = cached * self._limits.page_size
        # Sampling needs a forward pass, so a fully cached prompt recomputes its last token.
        self.table.occupy(request, rank, min(covered, request.known_len - 1))
        request.pages = pool.share(request.keys[:cached], request.lasting)
        request.pages += pool.take(self.pages_needed(request) - cached)
        request.published, request.publishes, request.stalled = cached, True, False
        request.state = State.PREFILL
        self.table.capacity[request.slot] = len(request.pages) * self._limits.page_size
        self.prefills[request.lane].append(request)
        self.running[rank] += 1
        self._residents[rank] += 1
        # What a prompt token returns depends on the next token, which may be in the next chunk.
        past = request.known if request.sampling.needs_past or request.returns.prompt else b""
        slot, wanted = request.slot % self._limits.num_slots, request.returns
        draft.admits[rank].append(
            Admit(slot, covered, request.sampling, past, request.prompt_len, wanted, request.returned)
        )
        draft.give(request, request.pages)

    def grow_all(self, needs: list[tuple[Request, int]], demand: list[int], draft: Draft) -> None:
        """Give running requests, sorted by rank, the given numbers of pages; `demand` is the total per rank."""
        pages = [page for pool, count in zip(self.pools, demand, strict=True) for page in pool.take(count)]
        at = 0
        for request, count in needs:
            self.grow(request, pages[at : at + count], draft)
            at += count

    def grow(self, request: Request, pages: list[int], draft: Draft) -> None:
        """Give a running request `pages`. By now enough of its tokens may be known to publish some of its pages."""
        if request.caches_outputs and self._limits.enable_prefix_cache:
            self.publish_output(request, request.limit)
        request.pages += pages
        self.table.capacity[request.slot] = len(request.pages) * self._limits.page_size
        draft.give(request, pages)

    def publish(self, request: Request, computed: int) -> None:
        """Insert the request's full pages among its first `computed` tokens into the tree, as far as it has keys.

        Stops for good at a page that another request computed at the same time, or whose parent was cut: further pages
        would descend from a node that this request does not hold.
        """
        full = min(len(request.keys), computed // self._limits.page_size)
        while request.publishes and request.published < full:
            at = request.published
            pool = self.pools[request.rank]
            parent = request.pages[at - 1] if at else -1
            request.publishes = pool.publish(request.keys[at], request.pages[at], parent, request.lasting)
            request.published += request.publishes
            self.news[request.rank] += 1

    def publish_output(self, request: Request, most: int) -> None:
        """Insert the full pages whose ids are known into the tree, including output, up to `most` tokens."""
        self.table.flush(request)
        ids = request.prompt + request.output
        computed = min(len(ids) // 4, int(self.table.position[request.slot]), most)
        extend_keys(request.keys, ids[: 4 * computed], self._limits.page_size, request.numerics)
        self.publish(request, computed)

    def prove(self, request: Request) -> None:
        """The first logits after all its known tokens are finite."""
        self.pools[request.rank].tree.prove(request.pages[: request.published])

    def distrust(self, request: Request) -> None:
        """The request's logits are not finite: stop sharing the pages they may come from."""
        self.pools[request.rank].cut(request.keys)

    def start_decode(self, request: Request) -> None:
        """All known tokens of the request are planned: move it to the batch, if it has more to generate."""
        self.prefills[request.lane].remove(request)
        if self.table.position[request.slot] < self.table.end[request.slot]:
            request.state = State.DECODE
            self.batches[request.lane].add(request.rank, request.slot)
            if request.returns.logits:
                self.costly[request.lane].append(request)
        else:
            self._leave(request)

    def finish_decode(self, request: Request) -> None:
        """All rows of a decoding request are planned; only its results are outstanding."""
        if request.returns.logits:
            self.costly[request.lane].remove(request)
        if not request.stalled:
            self.batches[request.lane].remove(request.rank, request.slot)
        self._leave(request)

    def stall(self, request: Request) -> None:
        """Leave a decoding request out of coming steps."""
        if not request.stalled:
            self.mark_stalled(request, True)
            self.batches[request.lane].remove(request.rank, request.slot)

    def mark_stalled(self, request: Request, stalled: bool) -> None:
        """Record whether a request is stalled."""
        self.news[request.rank] += stalled and not request.stalled
        request.stalled = stalled

    def resume(self, request: Request) -> None:
        """Put a stalled decoding request back into its batch."""
        if request.stalled:
            request.stalled = False
            self.batches[request.lane].add(request.rank, request.slot)

    def _leave(self, request: Request) -> None:
        request.state = State.LAUNCHED
        self.running[request.rank] -= 1
        self.news[request.rank] += 1

    def stop(self, request: Request) -> None:
        """Plan no more rows for a request, whatever its state."""
        if request.state is State.PREFILL:
            self.prefills[request.lane].remove(request)
            self._leave(request)
        elif request.state is State.DECODE:
            self.finish_decode(request)

    def release(self, request: Request) -> None:
        """Give back a request's pages. Raises RuntimeError if that leaves the rank idle and its pages do not add up."""
        if request.pages:
            pool = self.pools[request.rank]
            pool.release(request.pages)
            request.pages = []
            self.news[request.rank] += 1
            self._residents[request.rank] -= 1
            if not self._residents[request.rank]:
                pool.check(idle=True)

    def yielding(self, rank: int, lane: Lane) -> list[Request]:
        """Whom to preempt on `rank` if a request of `lane` finds no room: stalled ones and, for other lanes, BULK."""
        mine = [request for requests in self.prefills.values() for request in requests if request.rank == rank]
        found = [request for request in mine if request.stalled]
        found += [
            request for own in self.costly.values() for request in own if request.stalled and request.rank == rank
        ]
        if lane is not Lane.BULK:
            found += [request for request in mine if request.lane is Lane.BULK and not request.stalled]
            found += [self.table.request(slot) for slot in self.batches[Lane.BULK].rows(rank)]
        return found

    def next_victim(self, rank: int) -> Request:
        """Which request on `rank` to preempt, among those with rows left to launch: the last in the order, but BULK and
        stalled requests first."""
        found = self.yielding(rank, Lane.PRODUCTION)
        if not found:
            found = [self.table.request(slot) for batch in self.batches.values() for slot in batch.rows(rank)]
            found += [request for requests in self.prefills.values() for request in requests if request.rank == rank]
        return max(found, key=ORDER)
