"""Continuous batching as vLLM V1 does it: one step is planned, timed by the caller, then committed.

The caller owns the clock. `plan` says what the next step runs and takes its KV blocks; the caller
finds out how long that takes (a step-time model in virtual time, a sleep behind HTTP); `commit`
hands out the tokens. Between events a batch of decode rows repeats itself: `horizon` tells how many
such steps are one jump. All counters are integers, so a jump equals its steps exactly.
"""

from collections import deque
from heapq import heappop, heappush
from itertools import count

from kit.scheduler.pool import BlockPool
from kit.scheduler.request import Batch, Request, SchedulerConfig


class Scheduler:
    """Queues, batches and KV blocks of one replica.

    >>> scheduler = Scheduler(SchedulerConfig(kv_blocks=100))
    >>> scheduler.queue(Request(1, input_len=100, output_len=3))
    >>> batch = scheduler.plan(); [(tokens, before) for _, tokens, before in batch.chunks]
    [(100, 0)]
    >>> first, finished = scheduler.commit(batch); [request.key for request in first]
    [1]
    >>> batch = scheduler.plan(); scheduler.horizon(batch)
    2
    >>> first, finished = scheduler.commit(batch, 2); [request.generated for request in finished]
    [3]
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.kv_blocks)
        self.waiting: deque[Request] = deque()
        self.running: dict[int, Request] = {}  # in order of admission
        self.partial: Request | None = None  # the one whose prompt is not finished
        self.clock = self.decodes = self.context = 0  # decode steps so far; decode rows and their KV tokens
        self.peak_used = 0  # most blocks ever held by running requests
        self.preemptions = self.query_tokens = self.hit_tokens = 0
        self._grown = 0  # decode step up to which blocks are taken
        self._phase = [0] * config.block_size  # rows by when they next need a block
        self._due: list[tuple[int, int]] = []  # last decode step of a row, and its order
        self._order = count(1)
        self._blocked = False  # the head of the queue did not fit and nothing was released since

    def refusal(self, request: Request, ahead: int = 0) -> str | None:
        """Why the request is refused, with `ahead` more on their way to the queue; None where it is not."""
        config, total = self.config, request.input_len + request.output_len
        if total > config.max_model_len:
            return f"{total} tokens exceed max_model_len {config.max_model_len}"
        if -(-total // config.block_size) > config.kv_blocks:
            return f"{total} tokens exceed the KV cache of {config.kv_blocks} blocks"
        queued = len(self.waiting) + ahead + len(self.running) * config.queued_reqs_include_running
        if config.max_num_queued_reqs is not None and queued >= config.max_num_queued_reqs:
            return f"queue is full (max_num_queued_reqs {config.max_num_queued_reqs})"
        if config.max_num_queued_tokens is not None and self._prompt_tokens() >= config.max_num_queued_tokens:
            return f"queue is full (max_num_queued_tokens {config.max_num_queued_tokens})"
        return None

    def _prompt_tokens(self) -> int:
        """Prompts without a first token, whole: what vLLM's API server knows of them."""
        return sum(one.input_len for one in (*self.waiting, *self.running.values()) if not one.generated)

    def queue(self, request: Request) -> None:
        """Put a request that is not refused at the end of the queue."""
        if not self.config.enable_prefix_caching:
            request.path = ()
        self.waiting.append(request)

    def plan(self) -> Batch | None:
        """What the next step runs, with its blocks taken; None when there is nothing to run."""
        batch = Batch()
        if self.config.mixed_steps:
            self._plan_decodes(batch)
        budget = self.config.max_num_batched_tokens - batch.decodes
        while budget > 0 and not batch.preempted and (request := self.partial or self._admit(batch)):
            budget -= self._plan_chunk(batch, request, budget)
        if not self.config.mixed_steps and not batch.chunks:
            self._plan_decodes(batch)
        if batch.chunks or batch.decodes:
            self.peak_used = max(self.peak_used, self.pool.used)
            return batch
        return self.plan() if batch.preempted else None  # the only one running starts anew

    def horizon(self, batch: Batch) -> int:
        """Steps that the planned batch repeats unchanged: to the next finish or lack of blocks."""
        if batch.chunks:
            return 1
        while self._due[0][1] not in self.running:
            heappop(self._due)
        cycles, left = divmod(self.pool.available, self.decodes)
        steps = cycles * self.config.block_size
        while (need := self._need(self._grown + steps)) <= left:
            left -= need
            steps += 1
        return min(self._due[0][0] - self.clock, 1 + steps)

    def grow(self, steps: int) -> None:
        """Take the blocks that decode rows need up to `steps` from now (the first is taken)."""
        missing = self.clock + steps - self._grown
        if missing > 0:
            cycles, rest = divmod(missing, self.config.block_size)
            rest_blocks = sum(map(self._need, range(self._grown, self._grown + rest)))
            self.pool.take(cycles * self.decodes + rest_blocks)
            self._grown += missing
            self.peak_used = max(self.peak_used, self.pool.used)

    def commit(self, batch: Batch, steps: int = 1) -> tuple[list[Request], list[Request]]:
        """End `steps` of the batch: requests whose prompt is now computed, and finished ones."""
        finished: list[Request] = []
        if batch.decodes:
            self.grow(steps)
            self.clock += steps
            self.context += steps * self.decodes
            while self._due and self._due[0][0] <= self.clock:
                if (due := self.running.get(heappop(self._due)[1])) is not None:
                    finished.append(due)
        first = [request for request, tokens, _ in batch.chunks if self._advance(request, tokens)]
        finished += [request for request in first if request.generated == request.output_len]
        for request in finished:
            self._release(request)
        return first, finished

    def abort(self, request: Request) -> None:
        """Take a request out wherever it is; its computed prompt stays cached."""
        if self.running.get(request.order) is request:
            self._release(request)
        elif request in self.waiting:
            self.waiting.remove(request)
            self._blocked = False

    def output_tokens(self, request: Request) -> int:
        """Tokens generated so far."""
        return self.clock + request.offset - request.input_len + 1 if request.decoding else request.generated

    def decoding(self) -> list[Request]:
        """Requests that get a token from a decode step, in order of admission."""
        return [request for request in self.running.values() if request.decoding]

    @property
    def kv_cache_usage(self) -> float:
        """Fraction of the KV blocks that running requests hold, cached ones aside."""
        return self.pool.used / self.pool.total

    def _need(self, step: int) -> int:
        """Blocks that decode rows need for one step: those of rows whose last block is full by then."""
        return self._phase[-step % self.config.block_size]

    def _plan_decodes(self, batch: Batch) -> None:
        while self.decodes and self._need(self.clock) > self.pool.available:
            self._preempt(batch)
        if self.decodes:
            self.pool.take(self._need(self.clock))
            self._grown = self.clock + 1
            batch.decodes, batch.context = self.decodes, self.context + self.decodes

    def _admit(self, batch: Batch) -> Request | None:
        """Move the head of the queue to running if its whole prompt (and reserve) fits."""
        if not self.waiting or self._blocked or len(self.running) >= self.config.max_num_seqs:
            return None
        request, pool, size = self.waiting[0], self.pool, self.config.block_size
        matched = min(pool.match(request.path), request.target // size)
        need = -(-request.target // size) - matched + self._reserve(request)
        if need > pool.available - pool.pin_cost(request.path):
            if self.running:
                self._blocked = True
                return None
            pool.drop(request.path)  # alone and still too big: more of its path is cached than used
            matched = 0
        self.waiting.popleft()
        pool.pin(request.path)
        # the last token is always computed, so that there is a next one to sample
        request.computed = min(matched * size, (request.target - 1) // size * size)
        request.blocks = request.shared = matched
        if request.hit_tokens < 0:
            request.hit_tokens = request.computed
            self.query_tokens += request.target
            self.hit_tokens += request.computed
        request.order = next(self._order)
        self.running[request.order] = self.partial = request
        batch.admitted.append(request)
        return request

    def _reserve(self, request: Request) -> int:
        """Blocks that admission keeps free for output: the newcomer's own and that of running requests."""
        config = self.config
        if not config.reserve_own_output_fraction:
            return 0
        left = sum(one.output_len - self.output_tokens(one) for one in self.running.values())
        own = config.reserve_own_output_fraction * (request.output_len - request.generated)
        return int((own + config.reserve_running_output_fraction * left) // config.block_size)

    def _plan_chunk(self, batch: Batch, request: Request, budget: int) -> int:
        size, before = self.config.block_size, request.computed
        after = min(before + budget, request.target)
        more = -(-after // size) - request.blocks
        if more > self.pool.available:
            self._preempt(batch)
            return 0
        if more > 0:
            self.pool.take(more)
            request.blocks += more
        request.shared += self.pool.share(request.path, after // size)
        batch.chunks.append((request, after - before, before))
        if after == request.target:
            self.partial = None
        return after - before

    def _advance(self, request: Request, tokens: int) -> bool:
        """Count a computed chunk; True when the prompt is complete and a token comes out."""
        if self.running.get(request.order) is not request:
            return False  # aborted during the step
        request.computed += tokens
        if request.computed < request.target:
            return False
        request.generated += 1
        request.decoding, request.offset = True, request.target - self.clock
        self._count_row(request, 1)
        if request.generated < request.output_len:
            heappush(self._due, (self.clock + request.output_len - request.generated, request.order))
        return True

    def _count_row(self, request: Request, rows: int) -> None:
        self.decodes += rows
        self.context += rows * (self.clock + request.offset)
        self._phase[request.offset % self.config.block_size] += rows

    def _preempt(self, batch: Batch) -> None:
        """Send the last admitted request back to the head of the queue, to be recomputed."""
        request = self.running[next(reversed(self.running))]
        self._release(request)
        if not self.running:  # alone, so blocks that its path holds but it does not use are in the way
            self.pool.drop(request.path)
        request.target = request.input_len + request.generated
        request.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(request)
        batch.preempted.append(request)

    def _release(self, request: Request) -> None:
        """Leave running: full blocks stay cached under the path, the rest is freed."""
        size, pool = self.config.block_size, self.pool
        if request.decoding:
            self._count_row(request, -1)
            request.computed, request.generated = self.clock + request.offset, self.output_tokens(request)
            request.blocks = -(-(request.offset + max(self._grown, self.clock)) // size)
            request.decoding = False
        elif self.partial is request:
            self.partial = None
        request.shared += pool.share(request.path, request.computed // size)
        pool.free += request.blocks - request.shared
        pool.unpin(request.path)
        del self.running[request.order]
        self._blocked = False
        request.computed = request.blocks = request.shared = 0
