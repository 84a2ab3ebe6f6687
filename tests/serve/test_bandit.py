"""Bandits over versions: they find the better one, count what they are told once, and remember it."""

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.engine.serve.bandit import Arm, Bandit, pull
from agent.engine.serve.ledger import Ledger
from contract.errors import PitheadError
from tests.serve import models
from tests.serve.conftest import Served, tensor, until
from tests.serve.grpc_client import client, message

RAW = np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 64)
CHANCES = {"1": 0.2, "2": 0.6, "3": 0.5}
"""Of a reward, by version."""


# ---- pure


def played(given: Bandit, rounds: int, seed: int) -> tuple[Counter[str], float]:
    """How often each version was asked, and the reward that was lost to always asking the best."""
    source, world = random.Random(seed), random.Random(seed + 1)  # noqa: S311 - seeded
    arms: dict[str, Arm] = {}
    asked: Counter[str] = Counter()
    for _ in range(rounds):
        version = pull(given, list(CHANCES), arms, source)
        asked[version] += 1
        arms.setdefault(version, Arm()).earn(float(world.random() < CHANCES[version]))
    lost = sum((max(CHANCES.values()) - CHANCES[version]) * n for version, n in asked.items())
    return asked, lost


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "given", [Bandit(policy="thompson"), Bandit(policy="epsilon-greedy", epsilon=0.1)], ids=lambda b: b.policy
)
def test_it_comes_to_ask_the_best_version(given: Bandit, seed: int):
    asked, lost = played(given, 3_000, seed)
    assert asked.most_common(1)[0][0] == "2"
    blind = 3_000 * (0.6 - sum(CHANCES.values()) / 3)
    assert lost < blind / 3
    assert asked["1"] < 300  # the worst is soon known


def test_thompson_loses_less_and_less():
    """Its regret grows with the logarithm of the rounds: four times the rounds, far less than four times."""
    short = sum(played(Bandit(), 1_000, seed)[1] for seed in range(8))
    long = sum(played(Bandit(), 4_000, seed)[1] for seed in range(8))
    assert long < 2.5 * short


def test_the_same_seed_gives_the_same_choices():
    assert played(Bandit(), 300, 3) == played(Bandit(), 300, 3)


def test_partial_rewards_count_in_part_and_the_untried_come_first():
    greedy = Bandit(policy="epsilon-greedy", epsilon=0.0)
    arms = {"1": Arm(), "2": Arm()}
    for _ in range(10):
        arms["1"].earn(0.8)
        arms["2"].earn(0.3)
    assert pull(greedy, ["2", "1"], arms, random.Random(0)) == "1"  # noqa: S311 - seeded
    assert pull(greedy, ["1", "2", "3"], arms, random.Random(0)) == "3"  # noqa: S311 - seeded


# ---- what is kept


def test_what_was_acknowledged_is_on_the_disk_and_writes_are_shared(tmp_path: Path):
    path = tmp_path / "learned.json"

    async def test() -> None:
        ledger = Ledger(path)
        writes = 0
        write = ledger._write

        def counted(target: Path) -> None:
            nonlocal writes
            writes += 1
            write(target)

        ledger._write = counted  # type: ignore[method-assign]
        arm = ledger.arms("m").setdefault("1", Arm())

        async def reward() -> None:
            arm.earn(0.5)
            earned = arm.rewards
            await ledger.keep()
            assert Ledger(path).arms("m")["1"].rewards >= earned

        await asyncio.gather(*(reward() for _ in range(100)))
        assert writes <= 2
        assert Ledger(path).arms("m")["1"].reward == 50
        ledger.close(5)

    asyncio.run(test())
    assert [p.name for p in tmp_path.iterdir()] == ["learned.json"]


def test_rewards_one_after_the_other_are_all_written(tmp_path: Path):
    path = tmp_path / "learned.json"

    async def test() -> None:
        ledger = Ledger(path)
        arm = ledger.arms("m").setdefault("1", Arm())
        for i in range(1, 101):
            arm.earn(1)
            await ledger.keep()
            assert Ledger(path).arms("m")["1"].rewards == i
        ledger.close(5)

    asyncio.run(test())


def test_a_disk_that_does_not_take_it_is_told(tmp_path: Path):
    async def test() -> None:
        ledger = Ledger(tmp_path / "gone" / "learned.json")
        with pytest.raises(PitheadError) as caught:
            await ledger.keep()
        assert caught.value.code == "serve.state_unwritable"
        ledger.close(5)

    asyncio.run(test())


@pytest.mark.parametrize(
    "content", [b"", b'{"format": 1, "models": {"m": 3}}', b'{"format": 9, "models": {}}']
)
def test_a_file_that_is_damaged_ends_the_start(tmp_path: Path, content: bytes):
    path = tmp_path / "learned.json"
    path.write_bytes(content)
    with pytest.raises(PitheadError) as caught:
        Ledger(path)
    assert caught.value.code == "config.invalid"


# ---- a real server


def directory(path: Path, settings: str) -> Path:
    for version in CHANCES:
        (path / "choice" / version).mkdir(parents=True)
        (path / "choice" / version / "model.onnx").write_bytes(models.autoencoder(int(version)))
    (path / "serve.toml").write_text(f"[models.choice.bandit]\n{settings}\n")
    return path


def ask(served: Served, **more: Any) -> Any:
    answer = served.infer("choice", {"inputs": [tensor("input", "FP32", RAW)], **more})
    assert answer.status == 200, answer.body
    return answer.json


def reward(served: Served, request_id: str, value: Any) -> Any:
    return served.ask("POST", "/v2/models/choice/reward", {"id": request_id, "reward": value})


def learned(served: Served) -> dict[str, Any]:
    found: dict[str, Any] = served.get("/v2/models/choice/steering").json["bandit"]["versions"]
    return found


@pytest.fixture
def served(starts: Callable[..., Served], tmp_path: Path) -> Served:
    settings = 'policy = "thompson"\nseed = 5\nversions = ["1", "2", "3"]'
    made = starts(directory(tmp_path / "models", settings), "--grpc-port", "0")
    until(made.ready, "all versions are loaded")
    return made


def test_rewards_over_rest_teach_it_and_survive_a_crash(served: Served, starts: Callable[..., Served]):
    world = random.Random(1)  # noqa: S311 - seeded
    asked: Counter[str] = Counter()
    for i in range(300):
        answer = ask(served)
        asked[answer["model_version"]] += i >= 150
        assert (
            reward(served, answer["id"], float(world.random() < CHANCES[answer["model_version"]])).status
            == 200
        )
    assert asked["2"] > 90  # of the last 150; by chance it would be 50
    assert asked["1"] < 20
    before = learned(served)
    assert sum(arm["rewards"] for arm in before.values()) == 300
    labels = 'model="choice",version="2"'
    assert served.metric(f"pithead_bandit_rewards_total{{{labels}}}") == before["2"]["rewards"]
    served.process.kill()
    served.process.wait(10)
    again = starts(served.directory)
    until(again.ready, "all versions are loaded")
    after = learned(again)
    assert {v: (arm["rewards"], arm["reward"]) for v, arm in after.items()} == {
        v: (arm["rewards"], arm["reward"]) for v, arm in before.items()
    }
    got = Counter(ask(again)["model_version"] for _ in range(100))
    assert got["2"] > 50


def test_a_reward_counts_once_and_for_its_own_answer(served: Served):
    answer = ask(served, id="mine")
    assert answer["id"] == "mine"
    version = answer["model_version"]
    assert reward(served, "mine", 0.25).status == 200
    arm = learned(served)[version]
    assert (arm["rewards"], arm["reward"], arm["requests"]) == (1, 0.25, 1)
    assert reward(served, "mine", 1).status == 404
    assert reward(served, "nobody", 1).status == 404
    assert ask(served)["id"] != ask(served)["id"]


def test_what_is_no_reward_is_refused_and_can_be_given_again(served: Served):
    ask(served, id="again")
    for value in (1.5, -0.1, "much", None, True):
        assert reward(served, "again", value).status == 400
    assert reward(served, "again", 1).status == 200


def test_a_later_request_brings_the_reward_where_there_is_no_call_for_it(served: Served):
    with client(served.grpc_port) as grpc:
        first = grpc.infer(message(RAW, "choice"))
        assert first.id
        second = message(RAW, "choice")
        second.parameters["reward_id"].string_param = first.id
        second.parameters["reward"].double_param = 0.5
        grpc.infer(second)
    arm = learned(served)[first.model_version]
    assert (arm["rewards"], arm["reward"]) == (1, 0.5)
    wrong = {"parameters": {"reward_id": "x", "reward": 2}, "inputs": [tensor("input", "FP32", RAW)]}
    answer = served.infer("choice", wrong)
    assert (answer.status, "parameters.reward" in answer.error) == (400, True)
