"""Which requests run together, when, and what is refused: on sessions that can be held and counted."""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.engine.serve.aimd import BatchLimit
from agent.engine.serve.jobs import Job, cut
from agent.engine.serve.runner import Policy, Profile, Runner
from agent.engine.serve.warm_up import warm_up
from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.registry import open_session
from tests.inference.test_session_kinds import with_resource
from tests.serve import models

SPEC = (TensorSpec("x", "FP32", (-1, 2)),)
SHORT = Profile(10e-6, batches=True)
LONG = Profile(10e-3, batches=True)


class Held:
    """A session that doubles, waits for ``gate`` where it is closed, and remembers its batch sizes."""

    inputs = outputs = SPEC
    accelerator = "cpu"
    runtime = "held"

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.refuses: set[float] = set()

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.gate.wait(10)
        x = inputs["x"]
        self.batches.append(len(x))
        if self.refuses & set(x[:, 0].tolist()):
            raise PitheadError("inference.run_failed", "no")
        return {"x": x * 2}

    def close(self) -> None:
        pass


class Bench:
    """A runner, and what became of its jobs, by the value that they carry."""

    def __init__(self, profile: Profile, **policy: Any) -> None:
        self.session = Held()
        self.results: dict[float, Any] = {}
        self.order: list[float] = []
        loop = asyncio.get_running_loop()
        self.runner = Runner(
            "held", self.session, profile, Policy(**policy), self._finish, lambda *_: None, loop
        )

    def _finish(self, job: Job, result: Any, *_times: int) -> None:
        self.results[job.context] = result
        self.order.append(job.context)

    def submit(
        self, value: float, *, rows: int = 1, key: Any = (), priority: int = 0, timeout_s: float = 10
    ) -> None:
        x = np.full((rows, 2), value, np.float32)
        deadline = time.monotonic_ns() + round(timeout_s * 1e9)
        self.runner.submit(Job({"x": x}, rows, key, priority, deadline, value))

    async def flood(self) -> None:
        for i in range(20):
            self.submit(float(i))
            await asyncio.sleep(0.001)

    async def until(self, condition: Callable[[], Any]) -> None:
        end = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < end
            await asyncio.sleep(0.001)


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(test())


def test_what_comes_in_one_turn_runs_together():
    async def test() -> None:
        bench = Bench(SHORT)
        for i in range(5):
            bench.submit(float(i))
        assert not bench.results
        await bench.until(lambda: len(bench.results) == 5)
        assert bench.session.batches == [5]
        assert [bench.results[float(i)]["x"][0, 0] for i in range(5)] == [0, 2, 4, 6, 8]

    run(test)


def test_who_comes_alone_is_soon_answered_at_once():
    async def test() -> None:
        bench = Bench(SHORT)
        at_once = 0
        for i in range(100):
            bench.submit(float(i))
            at_once += float(i) in bench.results
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert len(bench.results) == 100
        assert at_once > 80

    run(test)


def test_short_models_that_do_not_batch_run_at_once():
    async def test() -> None:
        bench = Bench(Profile(10e-6))
        bench.submit(1.0, key=None)
        assert bench.results[1.0]["x"][0, 0] == 2

    run(test)


def test_what_comes_while_the_worker_is_busy_runs_together():
    async def test() -> None:
        bench = Bench(LONG, max_batch=64)
        bench.session.gate.clear()
        bench.submit(0.0)
        await asyncio.sleep(0.01)
        for i in range(1, 7):
            bench.submit(float(i))
        bench.session.gate.set()
        await bench.until(lambda: len(bench.results) == 7)
        assert bench.session.batches == [1, 6]

    run(test)


def test_one_bad_row_fails_alone():
    async def test() -> None:
        bench = Bench(SHORT)
        bench.session.refuses = {2.0}
        for i in range(4):
            bench.submit(float(i))
        await bench.until(lambda: len(bench.results) == 4)
        assert isinstance(bench.results[2.0], PitheadError)
        assert all(bench.results[v]["x"][0, 0] == 2 * v for v in (0.0, 1.0, 3.0))

    run(test)


def test_priorities():
    async def test() -> None:
        bench = Bench(LONG, max_batch=1)
        bench.session.gate.clear()
        for value in (0.0, 1.0):
            bench.submit(value)
            await asyncio.sleep(0.01)
        for value, priority in ((2.0, 0), (3.0, 2), (4.0, 1), (5.0, 2)):
            bench.submit(value, priority=priority)
        bench.session.gate.set()
        await bench.until(lambda: len(bench.results) == 6)
        assert bench.order[2:] == [4.0, 3.0, 5.0, 2.0]

    run(test)


def test_the_queue_is_bounded_in_number_and_in_time():
    async def test() -> None:
        bench = Bench(LONG, max_batch=1, max_queue=3)
        bench.session.gate.clear()
        with pytest.raises(PitheadError, match="requests wait"):
            await bench.flood()
        bench.session.gate.set()
        await bench.until(lambda: not bench.runner.busy)
        other = Bench(LONG, max_batch=1, max_wait_s=0.025)
        other.session.gate.clear()
        with pytest.raises(PitheadError, match=r"would wait for 0\.03") as caught:
            await other.flood()
        assert caught.value.retryable
        other.session.gate.set()
        await other.until(lambda: not other.runner.busy)

    run(test)


def test_deadlines():
    async def test() -> None:
        bench = Bench(LONG, max_batch=1)
        bench.session.gate.clear()
        bench.submit(0.0, timeout_s=0.02)
        await asyncio.sleep(0.005)
        bench.submit(1.0, timeout_s=0.02)
        bench.submit(2.0, timeout_s=0.02)
        bench.submit(3.0)
        await asyncio.sleep(0.03)
        bench.runner.tick(time.monotonic_ns())
        assert {v for v, r in bench.results.items() if r.code == "serve.timeout"} == {0.0, 1.0, 2.0}
        bench.session.gate.set()
        await bench.until(lambda: 3.0 in bench.results)
        assert bench.results[3.0]["x"][0, 0] == 6
        assert len(bench.order) == 4, "nobody is answered twice"

    run(test)


def test_a_run_that_hangs_loses_the_session_and_nobody_waits():
    async def test() -> None:
        bench = Bench(LONG, max_batch=1, hang_s=0.02)
        bench.session.gate.clear()
        for i in range(3):
            bench.submit(float(i))
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.03)
        bench.runner.tick(time.monotonic_ns())
        assert bench.runner.lost
        assert {r.code for r in bench.results.values()} == {"serve.model_lost"}
        assert len(bench.results) == 3
        bench.session.gate.set()
        await asyncio.sleep(0.02)
        assert len(bench.order) == 3

    run(test)


jobs = st.lists(st.tuples(st.integers(1, 6), st.sampled_from([(), (1,), None])), min_size=1, max_size=12)


@given(made=jobs, rows=st.integers(1, 16), preferred=st.lists(st.integers(1, 16), max_size=3))
def test_cut_keeps_to_its_limits(made: list[tuple[int, Any]], rows: int, preferred: list[int]):
    waiting = [Job({}, n, key, 0, 0, i) for i, (n, key) in enumerate(made)]
    batch = cut(waiting, rows, preferred)
    assert batch[0] is waiting[0]
    assert [j.context for j in batch] == sorted(j.context for j in batch)
    assert len(batch) == 1 or sum(j.rows for j in batch) <= rows
    assert len(batch) == 1 or {j.key for j in batch} == {waiting[0].key} != {None}


def test_the_batch_grows_by_one_and_shrinks_by_a_tenth():
    limit = BatchLimit(0.010, most=20, start=8)
    for _ in range(100):
        limit.saw(limit.rows, 0.001)
    assert limit.rows == 20
    limit.saw(20, 0.011)
    assert limit.rows == 18
    limit.saw(2, 0.001)
    assert limit.rows == 18, "a batch that was not full says nothing"
    for _ in range(100):
        limit.saw(limit.rows, 0.02)
    assert limit.rows == 1


@given(capacity=st.integers(2, 40))
def test_it_settles_near_what_the_objective_allows(capacity: int):
    limit = BatchLimit(0.1, most=64)
    seen = []
    for i in range(400):
        limit.saw(limit.rows, 0.1 * limit.rows / capacity)
        if i > 200:
            seen.append(limit.rows)
    assert 0.8 * capacity - 1 <= sum(seen) / len(seen) <= capacity + 1


def test_warm_up_leaves_no_trace_in_the_variables():
    session = open_session(with_resource(each=5), "tflite")
    warm_up(session, session.inputs)
    first = session.run({"x": np.array([[1, 2]], np.float32)})["sum"]
    assert float(first[0, 0]) == 1, "nothing was there before"
    session.close()


def test_warm_up_finds_out_what_may_be_batched():
    for content, batches in (
        (models.autoencoder(), True),
        (models.mean_over_rows(), False),
        (models.add_sub(), False),
    ):
        session = open_session(content, "onnx")
        assert warm_up(session, session.inputs).batches is batches
        session.close()
