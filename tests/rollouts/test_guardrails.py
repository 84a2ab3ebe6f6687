"""Guardrails: that they halt what is ruined, and leave alone what is only offline."""

import numpy as np
import pytest

from contract.messages import Aftermath, AssignmentState
from control_plane.core.guardrails import DeviceFacts, by_chance, check
from control_plane.core.policy import Guardrails

S = AssignmentState


def fleet(canaries: int, controls: int, silent: set[int]) -> list[DeviceFacts]:
    """Devices of which the first are canaries; ``silent`` are places."""
    return [
        DeviceFacts(f"d{n}", S.SOAKING if n < canaries else S.READY, treated=n < canaries, silent=n in silent)
        for n in range(canaries + controls)
    ]


@pytest.mark.parametrize("share", [0.01, 0.02, 0.05])
@pytest.mark.parametrize(("devices", "canaries"), [(20, 3), (100, 5), (100, 25), (1000, 50), (1000, 250)])
def test_devices_that_are_offline_for_reasons_of_their_own_rarely_halt(
    devices: int, canaries: int, share: float
):
    """At most 1 % of harmless releases."""
    rng = np.random.default_rng([devices, canaries])
    runs = 1000 if devices <= 100 else 300
    halted = 0
    for _ in range(runs):
        silent = set(np.flatnonzero(rng.random(devices) < share).tolist())
        halted += check(Guardrails(), fleet(canaries, devices - canaries, silent)) is not None
    assert halted <= runs * 0.01


@pytest.mark.parametrize("controls", [17, 37, 97])
def test_two_dead_canaries_of_three_halt(controls: int):
    breach = check(Guardrails(), fleet(3, controls, {0, 2}))
    assert breach is not None
    assert breach.guardrail == "silent_canaries"
    assert breach.devices == ("d0", "d2")


def test_half_of_many_canaries_dead_halt():
    assert check(Guardrails(), fleet(50, 950, set(range(25)))) is not None


def test_a_network_that_is_down_for_both_arms_does_not_halt():
    assert check(Guardrails(), fleet(3, 17, {0, 1, 2, *range(5, 17)})) is None


def test_a_canary_that_never_spoke_is_not_silent():
    devices = [
        DeviceFacts(f"d{n}", S.ACTIVATING, treated=n < 3, silent=None if n < 2 else False) for n in range(20)
    ]
    assert check(Guardrails(), devices) is None


def test_chance_is_the_tail_of_the_hypergeometric_distribution():
    assert by_chance(0, 3, 5, 17) == 1
    assert by_chance(2, 3, 0, 17) == pytest.approx(3 / 190)
    assert by_chance(3, 3, 0, 17) == pytest.approx(1 / 1140)


def test_engines_that_die_again_and_again_halt_unless_controls_do_the_same():
    canary = DeviceFacts("a", S.CONFIRMED, treated=True, restarts=3)
    breach = check(Guardrails(), [canary, DeviceFacts("b", S.READY, restarts=1)])
    assert breach is not None
    assert breach.guardrail == "engine_restarts"
    assert check(Guardrails(), [canary, DeviceFacts("b", S.READY, restarts=3)]) is None


def test_devices_that_fall_back_after_they_had_confirmed_count_like_all_others():
    fallen = [
        DeviceFacts(
            f"d{n}", S.ROLLED_BACK, treated=True, code="trial.crashed", aftermath=Aftermath.ROLLED_BACK
        )
        for n in range(2)
    ]
    breach = check(Guardrails(), fallen)
    assert breach is not None
    assert breach.guardrail == "crashed"


def test_an_acknowledged_breach_counts_again_with_another_device():
    devices = [DeviceFacts(f"d{n}", S.ROLLED_BACK, treated=True) for n in range(3)]
    known = {"rolled_back": frozenset({"d0", "d1"})}
    assert check(Guardrails(), devices[:2], known) is None
    assert check(Guardrails(), devices, known) is not None
    assert check(Guardrails(crashed=1), [DeviceFacts("d0", S.REFUSED, code="probe.crashed")], known)
