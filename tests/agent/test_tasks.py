"""Updates and probes in processes of their own, and engines that are replaced."""

import os
import queue
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator

import msgspec
import pytest

from agent.core import plan
from agent.core.plan import Fetch, Probe
from agent.core.slots import Serving, Slots
from agent.ports import Configure, Hello
from agent.service import children, engine_process, events
from agent.service.children import Children, Download
from agent.service.reporting import Reporter
from agent.service.steps import Steps
from contract.errors import PitheadError
from contract.messages import (
    Desired,
)
from tests.agent.bench import CLOCK, Assign, Bench, installed_order
from tests.engine.conftest import make_package

Wait = Callable[..., None]


@pytest.fixture
def running(bench: Bench) -> Iterator[Children]:
    found = Children(bench.layout, bench.box.put, server="https://127.0.0.1:1")
    yield found
    found.stop()
    for thread in threading.enumerate():
        if thread.name in {"fetch", "probe", "refresh"}:
            thread.join(20)


def test_an_update_process_that_fails_leaves_a_code(bench: Bench, running: Children, assign: Assign):
    step = Fetch(assign("1.0.0"))
    running.fetch(step, [Download("models/pump/1.0.0/manifest.json", "a" * 64, 10)])
    assert running.running("pump") == step
    event = bench.box.get(timeout=30)
    assert isinstance(event, events.Fetched)
    assert event.error is not None
    assert event.error.code == "update.not_released"
    running.finished(step)
    assert running.running("pump") is None
    bench.layout.bundle.write_bytes(b"nonsense")
    running.refresh('"e1"')
    refused = bench.box.get(timeout=30)
    assert isinstance(refused, events.Refreshed)
    assert isinstance(refused.result, PitheadError)


def test_a_cancelled_task_says_nothing_and_two_never_write_at_once(
    bench: Bench, running: Children, assign: Assign, wait_until: Wait
):
    holder = bench.layout.update_lock
    holder.touch()
    # An update process that outlived its supervisor holds the lock.
    orphan = subprocess.Popen(["flock", str(holder), "sleep", "60"], start_new_session=True)
    try:
        wait_until(lambda: subprocess.call(["flock", "-n", str(holder), "true"]) == 1, "the lock to be held")
        step = Fetch(assign("1.0.0"))
        running.fetch(step, [Download("models/pump/1.0.0/manifest.json", "a" * 64, 10)])
        with pytest.raises(queue.Empty):
            bench.box.get(timeout=0.5)
        running.cancel("pump")
        assert running.running("pump") is None
        wait_until(lambda: "pump" not in running._running, "the task to end")
        assert bench.box.empty()
    finally:
        os.killpg(orphan.pid, signal.SIGKILL)
        orphan.wait()


def steps_of(bench: Bench, running: Children, renewed: list[int] | None = None) -> Steps:
    return Steps(
        bench.world, running, Reporter(bench.world, bench.outbox, CLOCK),
        now=lambda: bench.now, wall=lambda: 1, fraction=lambda: 0.0,
        renew=lambda: None if renewed is None else renewed.append(1),
    )  # fmt: skip


def test_only_probes_that_began_and_were_waited_for_count_against_a_model(
    bench: Bench, running: Children, assign: Assign, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
):
    """The fleet changes its mind again and again while a probe takes its time: the device never went down."""
    gate = threading.Event()

    def slow(*_: object, **__: object) -> list[object]:
        assert gate.wait(30)
        return []

    monkeypatch.setattr(children.probing, "probe", slow)
    package = make_package(bench.layout.objects)
    wanted = assign("1.0.0", model="demo", manifest_sha256=package.digest,
                    manifest_length=package.manifest_path.stat().st_size)  # fmt: skip
    other = msgspec.structs.replace(wanted, model_name="other")
    steps, probe = steps_of(bench, running), Probe(wanted, package.variant.name)
    steps.execute("demo", probe)
    assert list(bench.state.scan("probes/", int).values()) == [1]
    steps.cancel("demo")
    for _ in range(6):
        steps.execute("demo", probe)
        steps.execute("other", Probe(other, package.variant.name))
    assert bench.state.scan("probes/", int) == {}
    assert bench.world.failures == {}
    gate.set()
    wait_until(lambda: not running.probing, "the probe to end")
    steps.execute("demo", probe)
    assert running.running("demo") == probe


def test_a_probe_is_told_whether_the_sandbox_is_required(
    bench: Bench, assign: Assign, monkeypatch: pytest.MonkeyPatch
):
    asked: list[object] = []

    def probed(*_: object, **options: object) -> list[object]:
        asked.append(options["require_sandbox"])
        return []

    monkeypatch.setattr(children.probing, "probe", probed)
    package = make_package(bench.layout.objects)
    for required in (True, False):
        strict = Children(bench.layout, bench.box.put, server="https://127.0.0.1:1", require_sandbox=required)
        strict.probe(Probe(assign("1.0.0"), package.variant.name), package.manifest, {})
        assert isinstance(bench.box.get(timeout=10), events.Probed)
    assert asked == [True, False]


@pytest.mark.parametrize("code", ["update.not_released", "storage.corrupt"])
def test_a_fetch_without_verified_metadata_waits_until_they_are_verified_again(
    bench: Bench, running: Children, assign: Assign, desire: Callable[..., Desired], code: str
):
    wanted = assign("2.0.0")
    bench.world.take(desire(wanted), "e1")
    renewed: list[int] = []
    steps, ended = steps_of(bench, running, renewed), events.Fetched(Fetch(wanted), PitheadError(code))
    for n in range(1, 9):
        steps.fetched(ended)
        assert len(renewed) == n
    assert bench.world.failures == {}
    bench.world.take(desire(wanted), "e1")
    steps.fetched(ended)
    assert bench.world.failures[wanted.manifest_sha256].code == code


def test_what_serves_and_is_damaged_is_fetched_with_longer_and_longer_pauses(
    bench: Bench, running: Children, assign: Assign, desire: Callable[..., Desired]
):
    wanted = installed_order(bench, assign, "2.0.0")
    active = Serving(bench.install(wanted))
    bench.world.slots.save(Slots("pump", active=active))
    bench.world.take(desire(wanted), "e1")
    bench.objects.path(active.digest).unlink()
    steps, tries = steps_of(bench, running), []
    for _ in range(1200):
        step = plan.plan(bench.world.desired, bench.world.observe(bench.now), bench.now).get("pump")
        if step is not None:
            assert isinstance(step, Fetch)
            tries.append(bench.now)
            steps.fetched(events.Fetched(step, PitheadError("update.hash_mismatch")))
        bench.now += 0.5
    assert 5 < len(tries) < 20
    assert bench.world.slots.get("pump").rejected == ()


def test_an_answer_that_is_none_is_an_interruption():
    with pytest.raises(PitheadError) as caught:
        children._answer("fetch", b"", b"boom\n", -9)
    assert caught.value.code == "install.interrupted"
    assert "boom" in caught.value.detail
    with pytest.raises(PitheadError) as caught:
        children._answer("fetch", b'{"ok": false, "code": "update.hash_mismatch", "detail": "x"}\n', b"", 1)
    assert caught.value.code == "update.hash_mismatch"


# --- the engine's process


def heard(bench: Bench, kind: type, timeout_s: float = 30.0) -> events.Event:
    while True:
        event = bench.box.get(timeout=timeout_s)
        if isinstance(event, kind) or (
            isinstance(event, events.EngineSaid) and isinstance(event.message, kind)
        ):
            return event


def test_an_engine_that_dies_or_hangs_is_replaced(bench: Bench, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engine_process, "SILENCE_S", 0.5)
    bench.engine.start()
    try:
        first = heard(bench, Hello)
        assert isinstance(first, events.EngineSaid)
        assert isinstance(first.message, Hello)
        assert bench.engine.send(Configure(()))
        os.kill(first.message.pid, signal.SIGKILL)
        second = heard(bench, Hello)
        assert isinstance(second, events.EngineSaid)
        assert isinstance(second.message, Hello)
        assert second.message.pid != first.message.pid
        bench.engine.lanes = 1
        os.kill(second.message.pid, signal.SIGSTOP)
        third = heard(bench, Hello)
        assert isinstance(third, events.EngineSaid)
        assert isinstance(third.message, Hello)
        assert third.message.pid not in {first.message.pid, second.message.pid}
    finally:
        bench.engine.leave(keep_engine=False)
        bench.engine.join()
    assert not engine_process.is_engine(third.message.pid)
