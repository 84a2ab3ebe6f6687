"""What must not stand in the table of a sink: shared places, exposed secrets, numbers that are none."""

from pathlib import Path
from typing import Any

import pytest

from agent.core.settings import parse
from agent.engine import sinks
from agent.service.exposed import exposed, missing
from contract.errors import PitheadError

PLC = {"kind": "modbus", "host": "plc"}
OPCUA = {"kind": "opcua", "url": "opc.tcp://x"}


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 0.0])
@pytest.mark.parametrize("table", [{**PLC, "alarm": "coil:0"}, {**OPCUA, "alarm": "i=1"}])  # fmt: skip
def test_a_factor_that_is_none_is_refused(table: dict[str, Any], factor: float):
    with pytest.raises(PitheadError, match="score_scale"):
        sinks.check(table | {"safe": 0, "score_scale": factor})


def test_a_safe_value_that_is_no_number_is_refused():
    with pytest.raises(PitheadError, match="safe is nan"):
        sinks.check({"kind": "opcua", "url": "opc.tcp://x", "alarm": "i=1", "safe": float("nan")})


def two(first: dict[str, Any], second: dict[str, Any], source: dict[str, Any] | None = None) -> object:
    lanes = [
        {"name": name, "model": "m", "source": source or {"kind": "system"}, "sinks": [table]}
        for name, table in (("a", first), ("b", second))
    ]
    return parse({"lanes": lanes})


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({**PLC, "alarm": "coil:1"}, {**PLC, "alarm": "1/coil:1"}),
        (
            {**PLC, "alarm": "coil:1", "score": "holding:4", "score_datatype": "float32"},
            {"kind": "modbus", "host": "PLC", "port": 502, "alarm": "holding:5"},
        ),
        ({**OPCUA, "alarm": "i=9"}, {**OPCUA, "url": "opc.tcp://x/", "alarm": "i=8", "heartbeat": "i=9"}),
        ({"kind": "file", "path": "out/a"}, {"kind": "file", "path": "out//a", "format": "csv"}),
    ],
    ids=["coil", "register", "node", "file"],
)  # fmt: skip
def test_two_sinks_do_not_write_to_one_place(first: dict[str, Any], second: dict[str, Any]):
    with pytest.raises(PitheadError) as caught:
        two(first, second)
    assert caught.value.code == "config.invalid"
    assert "'a'" in caught.value.detail
    assert "'b'" in caught.value.detail


def test_two_clients_of_a_broker_do_not_share_a_name():
    source = {"kind": "mqtt", "topic": "x", "host": "b", "client_id": "press"}
    with pytest.raises(PitheadError, match="client_id 'press'"):
        two({"kind": "file", "path": "x"}, {"kind": "mqtt", "host": "b", "client_id": "press"}, source)


def test_what_is_apart_stays_apart():
    unit = {"kind": "modbus", "host": "plc", "alarm": "coil:1"}
    assert two(unit, unit | {"unit_id": 2})
    assert two(unit, unit | {"port": 503})
    assert two({"kind": "mqtt", "host": "b"}, {"kind": "mqtt", "host": "b"})


def test_a_password_in_an_address_is_not_repeated():
    with pytest.raises(PitheadError) as caught:
        sinks.check({"kind": "http", "url": "https://robot:hunter2@hooks.plant/x"})
    assert "hunter2" not in caught.value.detail
    assert "credentials_file" in caught.value.detail


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"kind": "mqtt", "ca_file": "ca.pem"}, "tls"),
        ({"kind": "mqtt", "certificate_file": "a.pem", "key_file": "a.key"}, "tls"),
        ({"kind": "mqtt", "tls": True, "key_file": "a.key"}, "certificate_file"),
        ({"kind": "http", "url": "http://x/", "ca_file": "ca.pem"}, "https"),
        ({"kind": "http", "url": "https://x/", "key_file": "a.key"}, "certificate_file"),
        ({"kind": "http", "url": "http://:80/"}, "no host"),
        ({"kind": "http", "url": "http://[x/"}, "IPv6"),
        (
            {"kind": "opcua", "url": "opc.tcp://x", "alarm": "i=1", "safe": 0, "certificate_file": "a.der"},
            "security_policy",
        ),
    ],
)
def test_what_was_meant_to_be_secret_does_not_go_in_the_clear(table: dict[str, Any], words: str):
    with pytest.raises(PitheadError) as caught:
        sinks.check(table)
    assert (caught.value.code, words in caught.value.detail) == ("config.invalid", True), caught.value


def test_secrets_that_others_can_read_are_told_of(tmp_path: Path):
    files = {}
    for name, mode in (("open.toml", 0o644), ("shut.toml", 0o600)):
        files[name] = str(tmp_path / name)
        Path(files[name]).write_text("x")
        Path(files[name]).chmod(mode)
    plain = {"kind": "mqtt", "host": "broker.plant", "credentials_file": files["open.toml"]}
    tables = [plain, {"kind": "http", "url": "http://hooks.plant/", "token_file": files["shut.toml"]}]
    fine = [
        {"kind": "mqtt", "host": "b", "tls": True, "ca_file": "x", "credentials_file": files["shut.toml"]},
        {"kind": "http", "url": "http://127.0.0.1/", "token_file": files["shut.toml"]},
    ]
    lane = {"name": "a", "model": "m", "source": {"kind": "system"}}
    assert list(exposed(parse({"lanes": [lane | {"sinks": fine}]}))) == []
    found = [detail for detail, _ in exposed(parse({"lanes": [lane | {"sinks": tables}]}))]
    assert found == [
        f"a: sinks[0]: credentials_file {files['open.toml']} can be read by everybody on this device",
        "a: sinks[0]: the password goes unencrypted to broker.plant",
        "a: sinks[1]: the password goes unencrypted to hooks.plant",
    ]
    assert list(missing(parse({"lanes": [lane | {"sinks": fine}]}))) == ["a: sinks[0]: there is no ca_file x"]
