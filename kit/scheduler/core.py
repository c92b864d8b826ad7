"""Continuous batching as vLLM V1 does it: one step is planned, timed by the caller, then committed.

The caller owns the clock. `plan` says what the next step runs and takes its KV blocks; the caller
finds out how long that takes (a step-time model in virtual time, a sleep behind HTTP); `commit`
hands out the tokens. Between events a batch of decode rows repeats itself: `horizon` tells how many
such steps are one jump. All counters are integers, so a jump equals its steps exactly.
"""

from collections import deque
from heapq import heappop, heappush

from kit.scheduler.pool import BlockPool
from kit.scheduler.request import Batch, Request, SchedulerConfig


class Scheduler:
    """Queues, batches and KV blocks of one replica.

    >>> scheduler = Scheduler(SchedulerConfig(kv_blocks=100))
    >>> scheduler.add(Request(1, input_len=100, output_len=3))
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
        self.decodes = 0
        self.context = 0  # KV tokens of the decode rows
        self.clock = 0  # decode steps so far
        self.peak_used = 0  # most blocks ever held by running requests
        self.preemptions = self.query_tokens = self.hit_tokens = 0
        self.waiting_tokens = 0
        self._grown = 0  # decode step up to which blocks are taken
        self._phase = [0] * config.block_size  # rows by when they next need a block
        self._due: list[tuple[int, int, Request]] = []
        self._order = 0
        self._blocked = False  # the head of the queue did not fit and nothing was released since
        self._output_left = 0  # tokens that the running requests will still generate

    def add(self, request: Request) -> str | None:
        """Queue a request; a text says why it is refused instead."""
        config = self.config
        total = request.input_len + request.output_len
        if total > config.max_model_len:
            return f"{total} tokens exceed max_model_len {config.max_model_len}"
        if -(-total // config.block_size) > config.kv_blocks:
            return f"{total} tokens exceed the KV cache of {config.kv_blocks} blocks"
        queued = config.max_num_queued_reqs
        if queued is not None and len(self.waiting) >= queued:
            return f"queue is full (max_num_queued_reqs {queued})"
        queued = config.max_num_queued_tokens
        if queued is not None and self.waiting_tokens + request.input_len > queued:
            return f"queue is full (max_num_queued_tokens {queued})"
        if not config.enable_prefix_caching:
            request.path = ()
        self.waiting.append(request)
        self.waiting_tokens += request.target
        return None

    def plan(self) -> Batch | None:
        """What the next step runs, with its blocks taken; None when there is nothing to run."""
        batch = Batch()
        budget = self.config.max_num_batched_tokens
        if self.config.mixed_steps:
            self._plan_decodes(batch)
            budget -= batch.decodes
        self._plan_prefill(batch, budget)
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
        due = self._due
        while due[0][2].order != due[0][1] or not due[0][2].decoding:
            heappop(due)
        return min(due[0][0] - self.clock, 1 + self._affordable_steps())

    def grow(self, steps: int) -> None:
        """Take the blocks that decode rows need up to `steps` from now (the first is taken)."""
        missing = self.clock + steps - self._grown
        if missing > 0:
            self.pool.take(self._growth(missing))
            self._grown += missing
            self.peak_used = max(self.peak_used, self.pool.used)

    def commit(self, batch: Batch, steps: int = 1) -> tuple[list[Request], list[Request]]:
        """End `steps` of the batch: requests whose prompt is now computed, and finished ones."""
        finished: list[Request] = []
        if batch.decodes:
            self.grow(steps)
            self.clock += steps
            self.context += steps * self.decodes
            self._output_left -= steps * self.decodes
            due = self._due
            while due and due[0][0] <= self.clock:
                _, order, request = heappop(due)
                if request.order == order and request.decoding:
                    finished.append(request)
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
            self.waiting_tokens -= request.target

    def output_tokens(self, request: Request) -> int:
        """Tokens generated so far."""
        return request.generated + (self.clock - request.clock0 if request.decoding else 0)

    def decoding(self) -> list[Request]:
        """Requests that get a token from a decode step, in order of admission."""
        return [request for request in self.running.values() if request.decoding]

    @property
    def kv_cache_usage(self) -> float:
        """Fraction of the KV blocks that running requests hold, cached ones aside."""
        return self.pool.used / self.pool.total

    def _growth(self, steps: int) -> int:
        """Blocks that decode rows need for `steps` more steps after `_grown`."""
        size = self.config.block_size
        blocks = steps // size * self.decodes
        for step in range(self._grown, self._grown + steps % size):
            blocks += self._phase[-step % size]
        return blocks

    def _affordable_steps(self) -> int:
        """Steps after `_grown` for which blocks last."""
        size, available = self.config.block_size, self.pool.available
        cycles = available // self.decodes
        left, steps = available - cycles * self.decodes, cycles * size
        while (need := self._phase[-(self._grown + steps) % size]) <= left:
            left -= need
            steps += 1
        return steps

    def _plan_decodes(self, batch: Batch) -> None:
        size = self.config.block_size
        while self.decodes and self._phase[-self.clock % size] > self.pool.available:
            self._preempt(batch)
        if self.decodes:
            self.pool.take(self._phase[-self.clock % size])
            self._grown = self.clock + 1
            batch.decodes = self.decodes
            batch.context = self.context + self.decodes

    def _plan_prefill(self, batch: Batch, budget: int) -> None:
        if self.partial is not None and budget > 0 and not batch.preempted:
            budget -= self._plan_chunk(batch, self.partial, budget)
        while (
            self.waiting
            and budget > 0
            and not batch.preempted
            and self.partial is None
            and not self._blocked
            and len(self.running) < self.config.max_num_seqs
            and self._admit(batch)
        ):
            budget -= self._plan_chunk(batch, batch.admitted[-1], budget)

    def _admit(self, batch: Batch) -> bool:
        """Move the head of the queue to running if its whole prompt (and reserve) fits."""
        request, pool, size = self.waiting[0], self.pool, self.config.block_size
        matched = min(pool.match(request.path), request.target // size)
        need = -(-request.target // size) - matched + self._reserve(request)
        if need > pool.available - pool.pin_cost(request.path):
            if self.running:
                self._blocked = True
                return False
            pool.drop(request.path)  # alone and still too big: more of its path is cached than used
            matched = 0
        self.waiting.popleft()
        self.waiting_tokens -= request.target
        pool.pin(request.path)
        # the last token is always computed, so that there is a next one to sample
        request.computed = min(matched * size, (request.target - 1) // size * size)
        request.blocks = request.shared = matched
        if request.hit_tokens < 0:
            request.hit_tokens = request.computed
            self.query_tokens += request.target
            self.hit_tokens += request.computed
        self._order += 1
        request.order = self._order
        self.running[request.order] = self.partial = request
        self._output_left += request.output_len - request.generated
        batch.admitted.append(request)
        return True

    def _reserve(self, request: Request) -> int:
        config = self.config
        if not config.reserve_own_output_fraction:
            return 0
        own = config.reserve_own_output_fraction * (request.output_len - request.generated)
        others = config.reserve_running_output_fraction * self._output_left
        return int((own + others) // config.block_size)

    def _plan_chunk(self, batch: Batch, request: Request, budget: int) -> int:
        size, before = self.config.block_size, request.computed
        tokens = min(budget, request.target - before)
        after = before + tokens
        more = -(-after // size) - request.blocks
        if more > self.pool.available:
            self._preempt(batch)
            return 0
        if more > 0:
            self.pool.take(more)
            request.blocks += more
        request.shared += self.pool.share(request.path, after // size)
        batch.chunks.append((request, tokens, before))
        if after == request.target:
            self.partial = None
        return tokens

    def _advance(self, request: Request, tokens: int) -> bool:
        """Count a computed chunk; True when the prompt is complete and a token comes out."""
        if self.running.get(request.order) is not request:
            return False  # aborted during the step
        request.computed += tokens
        if request.computed < request.target:
            return False
        request.generated += 1
        self._output_left -= 1
        request.decoding = True
        request.clock0 = self.clock
        request.slots0 = request.target
        request.finish_clock = self.clock + request.output_len - request.generated
        self.decodes += 1
        self.context += request.slots0
        self._phase[(request.slots0 - self.clock) % self.config.block_size] += 1
        if request.generated < request.output_len:
            heappush(self._due, (request.finish_clock, request.order, request))
        return True

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
        self.waiting_tokens += request.target
        batch.preempted.append(request)

    def _release(self, request: Request) -> None:
        """Leave running: full blocks stay cached under the path, the rest is freed."""
        size, pool = self.config.block_size, self.pool
        computed, blocks = request.computed, request.blocks
        if request.decoding:
            steps = self.clock - request.clock0
            grown = max(self._grown, self.clock)
            computed = request.slots0 + steps
            blocks += -(-(request.slots0 + grown - request.clock0) // size) - blocks
            self.decodes -= 1
            self.context -= computed
            self._phase[(request.slots0 - request.clock0) % size] -= 1
            request.generated += steps
            request.decoding = False
        elif self.partial is request:
            self.partial = None
        self._output_left -= request.output_len - request.generated
        request.shared += pool.share(request.path, computed // size)
        pool.give(blocks - request.shared)
        pool.unpin(request.path)
        del self.running[request.order]
        self._blocked = False
        request.computed = request.blocks = request.shared = 0
