"""What steers requests while models come, go, fail and do not fit: in one process, with obedient sessions."""

import asyncio
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.engine.serve.alike import Face, apart
from agent.engine.serve.bandit import TRIED, Arm, Bandit, pull
from agent.engine.serve.catalogue import Limits
from agent.engine.serve.configuration import parse
from agent.engine.serve.ledger import Ledger
from agent.engine.serve.opening import Opened
from agent.engine.serve.repository import Candidate, Directory, Memory
from agent.engine.serve.requests import InferRequest, RequestedOutput
from agent.engine.serve.reread import Settled
from agent.engine.serve.service import Service
from agent.engine.serve.verdicts import Verdicts
from contract.errors import PitheadError
from contract.manifest import TensorSpec
from inference.reports import Placement

X, Y = TensorSpec("x", "FP32", (-1, 4)), TensorSpec("y", "FP32", (-1, 4))
LINE = """
[pipelines.line]
inputs = ["a"]
outputs = ["c"]
[[pipelines.line.steps]]
model = "first"
inputs = { x = "a" }
outputs = { y = "b" }
[[pipelines.line.steps]]
model = "second"
inputs = { x = "b" }
outputs = { y = "c" }
"""


class Times:
    """A session that multiplies, or fails."""

    accelerator, runtime = "cpu", "test"
    placement = Placement({})

    def __init__(self, factor: float, width: int = 4, *, fails: bool = False) -> None:
        self.inputs = (TensorSpec("x", "FP32", (-1, width)),)
        self.outputs = (TensorSpec("y", "FP32", (-1, width)),)
        self.factor, self.fails = factor, fails
        self.runs = 0

    def run(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        self.runs += 1
        if self.fails and inputs["x"].any():  # what is made up to measure it is not refused
            raise PitheadError("inference.run_failed", "it never does")
        return {"y": inputs["x"] * np.float32(self.factor)}

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass


def candidate(
    name: str, session: Any, version: str = "1", labels: tuple[str, ...] = (), size: int = 100
) -> Candidate:
    opened = Opened(session, session.inputs, session.outputs, size, labels={"y": labels})
    return Candidate(name, version, "test", str(id(session)), lambda: opened)


def run(
    test: Callable[[Service, Memory], Awaitable[None]],
    settings: str,
    *candidates: Candidate,
    wait: bool = True,
    **limits: Any,
) -> None:
    async def main() -> None:
        memory = Memory()
        for each in candidates:
            memory.put(each)
        service = Service([memory], Limits(configuration=parse(settings.encode()), **limits))
        await service.start()
        if wait:
            await until(lambda: service.ready, "all are ready")
        try:
            await test(service, memory)
        finally:
            await service.stop()

    asyncio.run(main())


async def until(condition: Callable[[], Any], what: str) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.002)


def ask(model: str = "m", name: str = "x", width: int = 4, **more: Any) -> InferRequest:
    return InferRequest(model, {name: np.arange(1, width + 1, dtype=np.float32)[None]}, **more)


# ---- shadow


def test_answers_that_were_kept_are_not_compared():
    async def test(service: Service, _memory: Memory) -> None:
        counts = service.steering.find("m").shadowing.counts  # type: ignore[union-attr]
        asked = 0
        while not counts.compared:  # what comes while the loop is busy is dropped
            asked += 1
            assert asked < 5_000
            await service.infer(InferRequest("m", {"x": np.full((1, 4), asked, np.float32)}))
            await asyncio.sleep(0.003)
        before = counts.compared
        for _ in range(3):
            last = InferRequest("m", {"x": np.full((1, 4), asked, np.float32)})
            assert (await service.infer(last)).cached
        await asyncio.sleep(0.01)  # a shadow run would begin after 0.001 s
        assert (counts.compared, counts.dropped["cached"]) == (before, 3)

    settings = '[models.m]\ncache_mb = 1\n[models.m.shadow]\nversion = "2"\nsample = 1\ncpu = 64\n'
    run(test, settings, candidate("m", Times(1)), candidate("m", Times(2), "2"))


def test_a_shadow_that_cannot_be_loaded_takes_nobody_out():
    def broken() -> Opened:
        raise PitheadError("probe.crashed", "it cannot")

    async def test(service: Service, _memory: Memory) -> None:
        await until(lambda: service.catalogue.entries["m"].versions["2"].reason, "it was tried")
        assert service.ready
        assert (await service.infer(ask())).version == "1"

    settings = '[models.m.shadow]\nversion = "2"\nsample = 1\n'
    run(test, settings, candidate("m", Times(1)), Candidate("m", "2", "test", "b", broken))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ('split = { weights = { "1" = 1, "2" = 1 } }', "models.m.split.weights"),
        ('bandit = { versions = ["1", "2"] }', "models.m.bandit.versions"),
        ('versions = ["2"]', "models.m.versions"),
    ],
)
def test_a_shadow_that_would_answer_is_refused(settings: str, key: str):
    with pytest.raises(PitheadError, match=key) as caught:
        parse(f'[models.m]\n{settings}\nshadow = {{ version = "2" }}\n'.encode())
    assert caught.value.code == "config.invalid"


# ---- split


def test_classes_have_the_names_of_the_version_that_answered():
    async def test(service: Service, _memory: Memory) -> None:
        for key in map(str, range(20)):
            wanted = (RequestedOutput("y", classes=1),)
            answer = await service.infer(ask(parameters={"split_key": key}, outputs=wanted))
            assert answer.outputs["y"][0, 0].endswith(b"d" + answer.version.encode())

    run(
        test,
        '[models.m.split]\nweights = { "1" = 1, "2" = 1 }\n',
        candidate("m", Times(1), "1", tuple(f"{c}1" for c in "abcd")),
        candidate("m", Times(2), "2", tuple(f"{c}2" for c in "abcd")),
    )


def test_a_version_of_another_shape_is_not_asked_beside_the_others():
    async def test(service: Service, memory: Memory) -> None:
        answers = [await service.infer(ask(id=str(i))) for i in range(20)]
        assert {a.version for a in answers} == {"1"}
        assert "shapes [-1, 4] and [-1, 5]" in service.steering.find("m").document()["left_out"]["2"]
        memory.put(candidate("m", Times(3), "2"))  # the same version, mended
        await service.load("m")
        answers = [await service.infer(ask(id=str(i))) for i in range(40)]
        assert {a.version for a in answers} == {"1", "2"}
        assert "left_out" not in service.steering.find("m").document()

    run(
        test,
        '[models.m.split]\nweights = { "1" = 2, "2" = 1 }\n',
        candidate("m", Times(1)),
        candidate("m", Times(2, width=5), "2"),
    )


def test_quantised_and_real_versions_are_alike():
    real = Face((X,), (Y,))
    int8 = Face((TensorSpec("x", "INT8", (-1, 4), 0.1, 0),), (TensorSpec("y", "INT8", (1, 4), 0.1, 0),))
    assert not apart(real, int8)
    assert not apart(int8, real)
    assert "INT64" in apart(real, Face((TensorSpec("x", "INT64", (-1, 4)),), (Y,)))
    assert apart(real, Face((X,), (Y, X))).startswith("outputs")


# ---- bandit


def test_a_version_that_only_fails_is_soon_not_asked_any_more():
    async def test(service: Service, _memory: Memory) -> None:
        failed = 0
        for _ in range(20):
            try:
                answer = await service.infer(ask())
            except PitheadError:
                failed += 1
            else:
                await service.steering.reward("m", answer.id, 0.5)
        assert failed == 1

    settings = '[models.m.bandit]\npolicy = "epsilon-greedy"\nepsilon = 0\nversions = ["1", "2"]\n'
    run(test, settings, candidate("m", Times(1)), candidate("m", Times(2, fails=True), "2"))


def test_a_version_that_nobody_rewards_does_not_get_all_for_ever():
    given = Bandit(policy="epsilon-greedy", epsilon=0)
    arms = {"1": Arm(10, 10, 5.0), "2": Arm(TRIED - 1)}
    source = random.Random(0)  # noqa: S311 - seeded
    assert pull(given, ["2", "1"], arms, source) == "2"
    arms["2"].requests = TRIED
    assert pull(given, ["2", "1"], arms, source) == "1"


def test_a_reward_that_could_not_be_kept_can_be_given_again(tmp_path: Path):
    async def test(service: Service, _memory: Memory) -> None:
        answer = await service.infer(ask())
        place = tmp_path / "later"
        with pytest.raises(PitheadError) as caught:
            await service.steering.reward("m", answer.id, 1)
        assert caught.value.code == "serve.state_unwritable"
        assert service.steering.find("m").arms["1"].rewards == 0
        place.mkdir()
        await service.steering.reward("m", answer.id, 1)
        arm = Ledger(place / "learned").arms("m")["1"]
        assert (arm.rewards, arm.reward) == (1, 1)

    learned = tmp_path / "later" / "learned"
    run(test, "[models.m.bandit]\n", candidate("m", Times(1)), learned=learned)


@pytest.mark.parametrize("arm", ['{"reward": -5.0}', '{"rewards": -1}', '{"requests": -1}'])
def test_what_no_bandit_can_have_learned_is_refused(tmp_path: Path, arm: str):
    """Drawing from it would raise at every request."""
    path = tmp_path / "learned"
    path.write_text(f'{{"format": 1, "models": {{"m": {{"1": {arm}}}}}}}')
    with pytest.raises(PitheadError, match="what bandits have learned"):
        Ledger(path)


def test_what_was_learned_ends_no_start_where_nothing_learns(tmp_path: Path):
    path = tmp_path / "learned"
    path.write_text("{")
    assert Limits(learned=path).configuration.models == {}
    Service([Memory()], Limits(learned=path))
    with pytest.raises(PitheadError, match="what bandits have learned"):
        Service([Memory()], Limits(learned=path, configuration=parse(b"[models.m.bandit]\n")))


# ---- pipelines


def test_a_request_that_is_refused_half_way_holds_no_model():
    async def test(service: Service, _memory: Memory) -> None:
        wrong = ask("line", "a", parameters={"reward_id": "x", "reward": 7})
        with pytest.raises(PitheadError, match=r"parameters\.reward"):
            await service.infer(wrong)
        live = service.catalogue.entries["first"].versions["1"].live
        assert live is not None
        assert live.in_flight == 0

    run(
        test,
        "[models.second.bandit]\n" + LINE,
        candidate("first", Times(2)),
        candidate("second", Times(3)),
    )


def test_a_step_s_bandit_is_rewarded_by_the_id_of_the_whole_answer():
    async def test(service: Service, _memory: Memory) -> None:
        answer = await service.infer(ask("line", "a"))
        assert answer.id
        await service.steering.reward("second", answer.id, 1)
        assert service.steering.find("second").arms["1"].reward == 1

    settings = "[models.second.bandit]\n" + LINE
    run(test, settings, candidate("first", Times(2)), candidate("second", Times(3)))


# ---- models that come and go


@pytest.mark.parametrize("model", ["m", "line"])
def test_who_waits_for_a_model_waits_no_longer_than_it_said(model: str):
    release = asyncio.Event()
    begun: list[None] = []

    def open_late() -> Opened:
        begun.append(None)
        while not release.is_set():
            time.sleep(0.005)
        session = Times(2)
        return Opened(session, session.inputs, session.outputs, 100)

    async def test(service: Service, _memory: Memory) -> None:
        name = "x" if model == "m" else "a"
        try:
            with pytest.raises(PitheadError) as caught:
                await service.infer(ask(model, name, timeout_us=50_000))
            assert caught.value.code == "serve.timeout"
            assert begun
        finally:
            release.set()
        assert (await service.infer(ask(model, name))).version == "1"
        counted = service.statistics(model)[0]["inference_stats"]
        assert (counted["fail"]["count"], counted["success"]["count"]) == (1, 1)

    late = [Candidate(name, "1", "test", "late", open_late) for name in ("m", "first", "second")]
    run(test, LINE, *late, wait=False, lazy=True)


def test_the_budget_holds_again_when_the_request_that_needed_more_is_answered():
    """A pipeline needs both of its models at once, though only one has room."""

    async def test(service: Service, _memory: Memory) -> None:
        answer = await service.infer(ask("line", "a"))
        assert answer.outputs["c"][0, 0] == 6
        catalogue = service.catalogue

        def held() -> int:
            versions = [v for e in catalogue.entries.values() for v in e.versions.values()]
            return sum(v.live is not None for v in versions)

        await until(lambda: held() == 1, "one has left")
        assert (await service.infer(ask("line", "a"))).outputs["c"][0, 0] == 6

    big = 400 * 2**20
    models = [candidate(n, Times(k), size=big) for n, k in (("first", 2), ("second", 3))]
    run(test, LINE, *models, wait=False, lazy=True, memory_bytes=big + big // 2)


def test_a_file_whose_name_is_no_text_is_passed_over(tmp_path: Path):
    (tmp_path / os.fsdecode(b"bad\xff.onnx")).write_bytes(b"")
    (tmp_path / 'so "so"\n.onnx').write_bytes(b"")
    found = Directory(tmp_path, Verdicts(tmp_path / "verdicts")).scan()
    assert [each.name for each in found] == ['so "so"\n']


# ---- serve.toml


def test_a_file_is_read_when_it_has_settled():
    settled = Settled((1,))
    assert [settled.changed(look) for look in [(1,), (2,), (3,), (3,), (3,)]] == [
        False,
        False,
        False,
        True,
        False,
    ]
    assert [settled.changed(look) for look in [(2, 2), (3,), (3,)]] == [
        False,
        False,
        False,
    ]  # a short absence
