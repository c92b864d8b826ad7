"""Batching, blocks and prefix cache: invariants, a plain per-request reference, cases by hand."""

from collections import OrderedDict, deque
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kit import catalog
from kit.engine_config import EngineConfig, engine_data, resolve
from kit.scheduler import (
    OPEN_END,
    BlockPool,
    Request,
    Scheduler,
    SchedulerConfig,
    lru_hit_fraction,
    scheduler_config,
)


def add(scheduler: Scheduler, request: Request) -> str | None:
    """Queue it unless it is refused."""
    if (why := scheduler.refusal(request)) is None:
        scheduler.queue(request)
    return why


POLICIES = [
    {},
    {"mixed_steps": False, "reserve_own_output_fraction": 1.0,
     "reserve_running_output_fraction": 0.098},
    {"reserve_own_output_fraction": 1.0, "reserve_running_output_fraction": 1.0},
]  # fmt: skip

configs = st.builds(
    lambda policy, **limits: SchedulerConfig(**limits, **policy),
    st.sampled_from(POLICIES),
    kv_blocks=st.integers(6, 60),
    block_size=st.sampled_from([1, 4, 16]),
    max_num_seqs=st.integers(1, 6),
    max_num_batched_tokens=st.integers(8, 64),
    enable_prefix_caching=st.booleans(),
)
# input_len, output_len, shared blocks, step at which it comes, step of its abort or None
calls = st.lists(
    st.tuples(
        st.integers(1, 120), st.integers(1, 40), st.integers(0, 3), st.integers(0, 60),
        st.one_of(st.none(), st.integers(0, 80)),
    ),
    min_size=1, max_size=14,
)  # fmt: skip


def private_blocks(scheduler: Scheduler) -> int:
    """Blocks that running requests hold beside the cached ones, counted request by request."""
    total, size = 0, scheduler.config.block_size
    for request in scheduler.running.values():
        blocks = request.blocks
        if request.decoding:
            blocks = -(-(request.offset + max(scheduler._grown, scheduler.clock)) // size)
        total += blocks - request.shared
    return total


def check(scheduler: Scheduler, batch) -> None:
    config, pool = scheduler.config, scheduler.pool
    cached = sum(blocks for blocks, _ in pool._extents.values())
    assert pool.free >= 0
    assert pool.evictable == sum(blocks for blocks, pins in pool._extents.values() if not pins)
    assert pool.free + cached + private_blocks(scheduler) == pool.total
    assert len(scheduler.running) <= config.max_num_seqs
    assert scheduler.decodes == len(scheduler.decoding())
    if batch is not None:
        chunk_tokens = sum(tokens for _, tokens, _ in batch.chunks)
        assert chunk_tokens + batch.decodes <= config.max_num_batched_tokens
        assert config.mixed_steps or not (batch.chunks and batch.decodes)


@settings(max_examples=300, deadline=None)
@given(configs, calls)
def test_blocks_limits_and_order(config: SchedulerConfig, drawn: list) -> None:
    scheduler = Scheduler(config)
    requests = [
        Request(key, input_len, output_len, ((-1, shared), (key, OPEN_END)) if shared else ())
        for key, (input_len, output_len, shared, _, _) in enumerate(drawn)
    ]
    for request, (input_len, *_) in zip(requests, drawn, strict=True):
        if request.path and request.path[0][1] * config.block_size > input_len:
            request.path = ((request.key, OPEN_END),)
    refused, ended, admitted, arrived = set(), set(), [], []
    for step in range(6000):
        for request, (*_, comes, _) in zip(requests, drawn, strict=True):
            if comes == step:
                arrived.append(request.key)
                if add(scheduler, request) is not None:
                    refused.add(request.key)
        batch = scheduler.plan()
        check(scheduler, batch)
        if batch is None:
            if step > 60:
                break
            continue
        admitted += [request.key for request in batch.admitted]
        for request, (*_, leaves) in zip(requests, drawn, strict=True):
            if leaves == step and request.key in arrived and request.key not in ended | refused:
                scheduler.abort(request)
                ended.add(request.key)
        check(scheduler, None)
        _, finished = scheduler.commit(batch)
        check(scheduler, None)
        for request in finished:
            assert request.key not in ended | refused
            assert request.generated == request.output_len
            ended.add(request.key)
    assert ended | refused == set(range(len(drawn)))
    assert not scheduler.running
    assert not scheduler.waiting
    assert scheduler.pool.used == 0
    first_admissions = list(dict.fromkeys(admitted))
    order = [key for key in arrived if key in first_admissions]
    assert first_admissions == order  # first come, first served


class Plain:
    """The same policy without prefix cache, one request at a time, as an engine's loop does it."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config, self.free = config, config.kv_blocks
        self.waiting, self.running = deque(), []

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.config.block_size)

    def allocate(self, request, tokens: int) -> bool:
        more = self.blocks(request.computed + tokens) - request.blocks
        if more > self.free:
            return False
        self.free -= more
        request.blocks += more
        return True

    def preempt(self) -> None:
        request = self.running.pop()
        self.free += request.blocks
        request.computed = request.blocks = 0
        request.target = request.input + request.out
        self.waiting.appendleft(request)

    def plan(self) -> tuple[list[tuple[int, int, int]], int]:
        budget, work, preempted, index = self.config.max_num_batched_tokens, [], False, 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            tokens = min(request.input + request.out - request.computed, budget)
            while not (done := self.allocate(request, tokens)):
                preempted = True
                self.preempt()
                if index >= len(self.running):
                    break
            if not done:
                break
            budget -= tokens
            work.append((request, tokens))
            index += 1
        while (
            self.waiting and not preempted and budget > 0
            and len(self.running) < self.config.max_num_seqs
        ):  # fmt: skip
            request = self.waiting[0]
            if self.blocks(request.input + request.out) > self.free:
                break
            tokens = min(request.input + request.out, budget)
            self.allocate(request, tokens)
            self.running.append(self.waiting.popleft())
            budget -= tokens
            work.append((request, tokens))
        self.work = work
        chunks = [(r.key, t, r.computed) for r, t in work if r.computed < r.target]
        return chunks, len(work) - len(chunks)

    def commit(self) -> list[int]:
        finished = []
        for request, tokens in self.work:
            request.computed += tokens
            if request.computed == request.input + request.out:
                request.out += 1
                if request.out == request.limit:
                    finished.append(request.key)
                    self.running.remove(request)
                    self.free += request.blocks
        return finished


@settings(max_examples=200, deadline=None)
@given(
    st.builds(SchedulerConfig, kv_blocks=st.integers(6, 40), block_size=st.sampled_from([1, 4, 16]),
              max_num_seqs=st.integers(1, 6), max_num_batched_tokens=st.integers(8, 64)),
    calls,
)  # fmt: skip
def test_equals_a_plain_loop_over_requests(config: SchedulerConfig, drawn: list) -> None:
    fast, plain = Scheduler(config), Plain(config)
    for step in range(4000):
        for key, (input_len, output_len, _, comes, _) in enumerate(drawn):
            if comes == step and add(fast, Request(key, input_len, output_len)) is None:
                plain.waiting.append(SimpleNamespace(
                    key=key, input=input_len, target=input_len, limit=output_len, out=0, computed=0,
                    blocks=0,
                ))  # fmt: skip
        batch, (chunks, decodes) = fast.plan(), plain.plan()
        if batch is None:
            assert not chunks
            assert not decodes
            if step > 60:
                return
            continue
        assert [(r.key, tokens, before) for r, tokens, before in batch.chunks] == chunks
        assert batch.decodes == decodes
        _, finished = fast.commit(batch)
        assert sorted(r.key for r in finished) == sorted(plain.commit())
        assert fast.pool.free + sum(blocks for blocks, _ in fast.pool._extents.values()) == plain.free


@settings(max_examples=300, deadline=None)
@given(
    st.integers(8, 40),
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 3), st.integers(0, 2)), max_size=40),
)
def test_extents_equal_block_lru(capacity: int, walks: list) -> None:
    """Prompts down a prefix tree: hits as of one LRU over single blocks, tail evicted first."""
    pool, blocks = BlockPool(capacity), OrderedDict()
    for root, child, leaf in walks:
        path = [((root,), 3)]
        if child:
            path.append(((root, child), 5))
            if leaf:
                path.append(((root, child, leaf), 8))
        names = [(key, i) for n, (key, end) in enumerate(path)
                 for i in range(path[n - 1][1] if n else 0, end)]  # fmt: skip
        found = 0
        while found < len(names) and names[found] in blocks:
            found += 1
        for name in reversed(names):
            blocks[name] = None
            blocks.move_to_end(name)
        while len(blocks) > capacity:
            blocks.popitem(last=False)
        assert pool.store(tuple((hash(key), end) for key, end in path)) == found


def test_chunked_prefill_shares_the_budget_with_decodes() -> None:
    scheduler = Scheduler(SchedulerConfig(kv_blocks=100, max_num_batched_tokens=100))
    add(scheduler, Request(1, 40, 5))
    add(scheduler, Request(2, 150, 2))
    sizes = []
    while (batch := scheduler.plan()) is not None:
        sizes.append(([tokens for _, tokens, _ in batch.chunks], batch.decodes))
        scheduler.commit(batch)
    assert sizes == [([40, 60], 0), ([90], 1), ([], 2), ([], 1), ([], 1)]


def test_prefill_first_policy_lets_decodes_wait() -> None:
    scheduler = Scheduler(SchedulerConfig(kv_blocks=100, max_num_batched_tokens=100, mixed_steps=False))
    add(scheduler, Request(1, 40, 5))
    add(scheduler, Request(2, 150, 2))
    sizes = []
    while (batch := scheduler.plan()) is not None:
        sizes.append(([tokens for _, tokens, _ in batch.chunks], batch.decodes))
        scheduler.commit(batch)
    assert sizes == [([40, 60], 0), ([90], 0), ([], 2), ([], 1), ([], 1), ([], 1)]


def test_prefix_is_found_in_whole_blocks_and_the_last_token_is_computed() -> None:
    scheduler = Scheduler(SchedulerConfig(kv_blocks=100))
    path = ((7, OPEN_END),)
    add(scheduler, Request(1, 40, 9, path))  # 40 prompt + 8 generated tokens with KV: 3 full blocks
    while (batch := scheduler.plan()) is not None:
        scheduler.commit(batch)
    add(scheduler, again := Request(2, 60, 1, path))
    scheduler.plan()
    assert again.hit_tokens == 48
    scheduler = Scheduler(SchedulerConfig(kv_blocks=100))
    scheduler.pool.store(((7, 4),))
    add(scheduler, whole := Request(3, 64, 1, path))
    assert [tokens for _, tokens, _ in scheduler.plan().chunks] == [16]
    assert whole.hit_tokens == 48


def test_preemption_recomputes_prompt_and_output_of_the_last_admitted() -> None:
    scheduler = Scheduler(SchedulerConfig(kv_blocks=4, enable_prefix_caching=False))
    add(scheduler, Request(1, 30, 30))
    add(scheduler, last := Request(2, 28, 10))
    preempted = None
    while preempted is None:
        batch = scheduler.plan()
        preempted = batch.preempted[0] if batch.preempted else None
        scheduler.commit(batch)
    assert preempted is last
    assert (last.generated, last.target, scheduler.preemptions) == (3, 31, 1)


def test_horizon_stops_where_blocks_run_out() -> None:
    scheduler = Scheduler(SchedulerConfig(kv_blocks=4))
    add(scheduler, Request(1, 16, 48))
    add(scheduler, Request(2, 16, 48))
    scheduler.commit(scheduler.plan())
    batch = scheduler.plan()
    assert scheduler.horizon(batch) == 16
    scheduler.commit(batch, 16)
    assert scheduler.plan().preempted


@pytest.mark.parametrize(
    ("limits", "text"),
    [({"max_model_len": 50}, "exceed max_model_len 50"), ({"kv_blocks": 3}, "exceed the KV cache")],
)
def test_what_can_never_run_is_refused_with_a_reason(limits: dict, text: str) -> None:
    assert text in add(Scheduler(SchedulerConfig(**{"kv_blocks": 100, **limits})), Request(0, 50, 10))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_full_queue_counts_what_the_engine_counts(engine: str) -> None:
    counts = engine_data(engine)["admission"]["max_num_queued_reqs"]["counts"]
    parts = catalog.model("llama-3.1-8b"), catalog.gpu("h100-sxm-80gb")
    limits = scheduler_config(resolve(EngineConfig(engine=engine), *parts), 1600)
    scheduler = Scheduler(replace(limits, max_num_seqs=1, max_num_queued_reqs=2))
    assert add(scheduler, Request(0, 50, 10)) is None
    scheduler.commit(scheduler.plan())
    assert add(scheduler, Request(1, 50, 10)) is None
    told = add(scheduler, Request(2, 50, 10))  # one runs and one waits
    assert told == {"in_flight": "queue is full (max_num_queued_reqs 2)", "waiting": None}[counts]
    assert "max_num_queued_reqs 2" in add(scheduler, Request(3, 50, 10))


def test_queued_tokens_are_whole_prompts_without_a_first_token() -> None:
    scheduler = Scheduler(SchedulerConfig(100, max_num_seqs=1, max_num_queued_tokens=60))
    assert [add(scheduler, Request(key, 50, 10)) for key in range(2)] == [None, None]  # 50 there, which is below 60
    assert "max_num_queued_tokens 60" in add(scheduler, Request(2, 1, 10))
    scheduler.commit(scheduler.plan())
    assert add(scheduler, Request(3, 500, 10)) is None  # the first one decodes now


def test_lru_hit_fraction_counts_blocks() -> None:
    a, b = ((1, 2),), ((2, 2),)
    assert lru_hit_fraction([a, b, a], 4) == pytest.approx(2 / 6)
    assert lru_hit_fraction([a, b, a], 2) == 0
