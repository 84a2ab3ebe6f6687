"""The chapters of the demo. Each does what an operator would do, then checks what the fleet says."""

from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from contract.errors import ERRORS
from models import shipped
from models.package import read_manifest
from simulator.demo import policies
from simulator.demo.fleet import Fleet
from simulator.demo.labels import agreement, read_labels
from simulator.demo.narrator import Narrator
from simulator.device import LocalDevice
from simulator.processes import wait_until

MODEL: Final = "shuttle"
RECIPES: Final = {"1.0.0": "baseline", "2.0.0": "wider", "3.0.0": "one-regime", "4.0.0": "longer"}
SETTINGS: Final = {"1.0.0": {"epochs": "12"}}
"""Trained too shortly, so that the next version is seen to be better."""
ENDED: Final = frozenset({"succeeded", "rolled_back", "aborted"})
WAITS_FOR_A_PERSON: Final = frozenset({"held", "coverage"})
GOOD_AGREEMENT: Final = 0.9
STEP_TIMEOUT_S: Final = 180.0
ROLLOUT_TIMEOUT_S: Final = 240.0


class Story:
    """The whole main job on one fleet."""

    def __init__(self, fleet: Fleet, narrator: Narrator) -> None:
        self.fleet = fleet
        self.plant = fleet.plant
        self.tell = narrator
        self.builds: dict[str, Future[Path]] = {}
        self._workshop = ThreadPoolExecutor(1)
        self.offsets: dict[str, int] = {}

    @property
    def n(self) -> int:
        """Number of devices."""
        return len(self.fleet.devices)

    def run(self) -> None:
        """All chapters in order."""
        with self._workshop:
            self._chapters()

    def _chapters(self) -> None:
        self.set_up()
        self.enrol()
        self.first_version()
        self.anomalies()
        self.good_canary()
        self.bad_canary()
        self.tampered()

    def set_up(self) -> None:
        """Keys, certificates, broker, control plane, a recording; the model's versions are made meanwhile."""
        with self.tell.chapter("Set up"):
            for version, recipe in RECIPES.items():
                order = shipped.order(MODEL, recipe=recipe, settings=SETTINGS.get(version))
                self.builds[version] = self._workshop.submit(shipped.build_apart, order, self.fleet.packages)
            rows = self.fleet.write_recording()
            self.fleet.configure(rows)
            said = self.plant.prepare()
            keys = [
                line for line in said.splitlines() if line.startswith(str(self.plant.data_dir / "offline"))
            ]
            self.tell.say(
                f"key ceremony: {len(keys)} offline keys, encrypted; roots and targets signed 2-of-3"
            )
            self.plant.start()
            self.tell.say(
                f"mosquitto on {self.plant.ports.broker}, devices on {self.plant.ports.device} (mutual TLS)"
            )
            self.tell.check("control plane and broker run", self.plant.api_url, passed=True)

    def enrol(self) -> None:
        """Every device makes its own key and joins with a token of its line."""
        with self.tell.chapter("Enrol"):
            bar = self.tell.bar("enrolling", self.n)
            lines = self.fleet.by_line()
            done = 0
            for line, devices in lines.items():
                token = self.plant.join_token(len(devices), {"line": line})
                self.fleet.enrol(devices, token)
                done += len(devices)
                bar.set(done, f"line {line}")
            self.offsets = {d.device_id: self.fleet.offsets[d.name] for d in self.fleet.devices}
            self.fleet.start()
            bar = self.tell.bar("online", self.n)
            self._until(bar, self._online, self.n, "devices to be online")
            self.tell.check("devices enrolled and online", f"{self._online()} of {self.n}", passed=True)

    def first_version(self) -> None:
        """Version 1 on all at once: there is nothing yet to compare it with."""
        with self.tell.chapter("Version 1.0.0 on all"):
            self._release("1.0.0")
            rollout = self._create("1.0.0", policies.FIRST_INSTALL)
            ended = self._watch(rollout)
            self._serving("1.0.0", self.n)
            self.tell.check("rollout", f"{ended['state']}", passed=ended["state"] == "succeeded")

    def anomalies(self) -> None:
        """Alarms of the replayed recording, held against its labels."""
        with self.tell.chapter("Anomalies"):
            labels = read_labels(self.fleet.recording)
            wanted = 300 * self.n
            bar = self.tell.bar("rows scored", wanted)
            self._until(bar, lambda: min(wanted, self._scored("1.0.0")), wanted, "rows to be scored")
            summaries = self.plant.pages("/api/v1/summaries", {"model": MODEL, "version": "1.0.0"})
            alarms = self.plant.pages("/api/v1/anomalies", {"model": MODEL, "version": "1.0.0"})
            result = agreement(labels, self.offsets, summaries, alarms)
            self.tell.check(
                "alarms agree with the labels",
                f"precision {result.precision:.3f}, recall {result.recall:.3f} "
                f"on {result.rows} rows with {result.labelled} anomalies",
                passed=result.precision >= GOOD_AGREEMENT and result.recall >= GOOD_AGREEMENT,
            )

    def good_canary(self) -> None:
        """Version 2 by canary; one device loses its power in the middle of the install."""
        with self.tell.chapter("Version 2.0.0 by canary"):
            self._release("2.0.0")
            rollout = self._create("2.0.0", policies.canary(self.n))
            victim = self._cut_power_during_install("2.0.0")
            victim.start()
            ended = self._watch(rollout)
            self.tell.check("rollout", f"{ended['state']}", passed=ended["state"] == "succeeded")
            self._serving("2.0.0", self.n)
            back = self.fleet.serving(MODEL).get(victim.device_id)
            self.tell.check(
                f"{victim.name}, killed in the middle of the install, serves",
                str(back),
                passed=back == "2.0.0",
            )

    def bad_canary(self) -> None:
        """Version 3 passes its golden vectors and raises too many alarms: halted and rolled back."""
        with self.tell.chapter("Version 3.0.0 is bad"):
            self._release("3.0.0")
            rollout = self._create("3.0.0", policies.canary(self.n))
            ended = self._watch(rollout)
            self.tell.check(
                "halted and rolled back", f"{ended['state']}: {ended.get('reason', '')}",
                passed=ended["state"] == "rolled_back",
            )  # fmt: skip
            touched = {r["device_id"] for r in self._receipts("3.0.0") if r["state"] == "soaking"}
            self.tell.check(
                "it never got beyond its canaries",
                f"{len(touched)} devices ran it",
                passed=0 < len(touched) <= 3,  # noqa: PLR2004
            )
            self._serving("2.0.0", self.n)

    def tampered(self) -> None:
        """A bit of version 4 flips in the control plane's storage: no device takes it."""
        with self.tell.chapter("Version 4.0.0 is tampered with"):
            self._release("4.0.0")
            flipped = self.fleet.flip_bit_in_storage(self.fleet.packages / MODEL / "4.0.0")
            self.tell.say(f"one bit flipped in {flipped} stored files of 4.0.0")
            self._create("4.0.0", policies.everybody_may_refuse(self.n))
            bar = self.tell.bar("refusals", self.n)
            refusals: dict[str, str] = {}

            def refused() -> int:
                for receipt in self._receipts("4.0.0"):
                    if receipt["state"] == "refused":
                        refusals[receipt["device_id"]] = receipt["code"]
                return len(refusals)

            self._until(bar, refused, self.n, "all devices to refuse")
            reasons = Counter(refusals.values())
            said = ", ".join(f"{n} x {code} ({ERRORS[code].summary})" for code, n in reasons.items())
            self.tell.check(
                "every device refuses and says why", said, passed=set(reasons) == {"update.hash_mismatch"}
            )
            self._serving("2.0.0", self.n)

    # ------------------------------------------------------------------ what the chapters are made of

    def _release(self, version: str) -> None:
        """Build (or wait until it is built), sign and publish."""
        package = self.builds[version].result()
        self.plant.release(package)
        summary = read_manifest(package).summary
        self.tell.say(f"{MODEL} {version} signed with the release key and published: {summary}")

    def _online(self) -> int:
        return sum(bool(device["online"]) for device in self.plant.devices())

    def _scored(self, version: str) -> int:
        summaries = self.plant.pages("/api/v1/summaries", {"model": MODEL, "version": version})
        return int(sum(s["count"] for s in summaries))

    def _receipts(self, version: str) -> Any:
        return self.plant.pages("/api/v1/receipts", {"model": MODEL, "version": version})

    def _until(self, bar: Any, count: Any, total: int, what: str, timeout_s: float = STEP_TIMEOUT_S) -> None:
        def enough() -> bool:
            done = count()
            bar.set(done)
            return bool(done >= total)

        wait_until(enough, what, timeout_s, poll_s=0.5)

    def _create(self, version: str, policy: dict[str, Any]) -> str:
        body = {"model": MODEL, "version": version, "policy": policy}
        return str(self.plant.api.post("/api/v1/rollouts", body)["id"])

    def _watch(self, rollout: str) -> dict[str, Any]:
        """Follow a rollout to its end, approving where the gate asks for a person."""
        bar = self.tell.bar("devices confirmed", self.n)
        shown: set[int] = set()

        def ended() -> dict[str, Any] | None:
            seen: dict[str, Any] = self.plant.api.get(f"/api/v1/rollouts/{rollout}")
            bar.set(seen["states"].get("confirmed", 0), seen["reason"])
            for verdict in self.plant.api.get(f"/api/v1/rollouts/{rollout}/verdicts"):
                if verdict["id"] not in shown and verdict["verdict"] != "hold":
                    self.tell.verdict(verdict)
                shown.add(verdict["id"])
            if seen["pause"] in WAITS_FOR_A_PERSON:
                self._decide(seen)
            return seen if seen["state"] in ENDED else None

        return wait_until(ended, f"rollout {rollout} to end", ROLLOUT_TIMEOUT_S, poll_s=0.5)

    def _decide(self, rollout: dict[str, Any]) -> None:
        """Do as an operator where the gate may not decide: look at the canaries, go on or back."""
        path = f"/api/v1/rollouts/{rollout['id']}"
        self.tell.say(f"waits for a person: {rollout['reason']}")
        gate = [v for v in self.plant.api.get(f"{path}/verdicts") if v["kind"] == "gate"]
        shifts = {m["metric"]: m["shift"] for m in gate[-1]["numbers"]["look"]["metrics"]} if gate else {}
        margins = {m["name"]: m["margin"] for m in rollout["policy"]["metrics"]}
        worse = [name for name, shift in shifts.items() if shift is not None and shift > margins[name]]
        seen = ", ".join(f"{name} {shift:+.3f}" for name, shift in shifts.items() if shift is not None)
        decision = "rollback" if worse else "approve"
        reason = f"canaries against controls: {seen or 'nothing compared'}"
        self.tell.say(f"an operator looks at the numbers and says {decision}: {reason}")
        self.plant.api.post(f"{path}/{decision}", {"reason": reason})

    def _serving(self, version: str, total: int) -> None:
        bar = self.tell.bar(f"serving {version}", total)

        def serving() -> int:
            return sum(v == version for v in self.fleet.serving(MODEL).values())

        self._until(bar, serving, total, f"{total} devices to serve {version}")
        self.tell.check(f"devices serving {version}", f"{serving()} of {total}", passed=serving() == total)

    def _cut_power_during_install(self, version: str) -> LocalDevice:
        """Kill the first device that says that it is fetching or has verified ``version``."""
        by_id = self.fleet.by_id()

        def installing() -> str | None:
            latest: dict[str, str] = {}
            for receipt in reversed(self._receipts(version)):
                latest[receipt["device_id"]] = receipt["state"]
            return next((d for d, state in latest.items() if state in {"fetching", "verified"}), None)

        device_id = wait_until(
            installing, f"a device to be installing {version}", STEP_TIMEOUT_S, poll_s=0.05
        )
        device = by_id[device_id]
        killed = device.power_cut()
        self.tell.say(f"power cut on {device.name}: {killed} processes killed at once")
        return device
