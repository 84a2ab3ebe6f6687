from pathlib import Path

from control_plane.settings import load


def test_file_environment_and_flags_override_in_this_order(tmp_path: Path) -> None:
    (tmp_path / "pithead.toml").write_text('host = "file"\napi_port = 1000\ndevice_port = 1001\n')
    environment = {
        "PITHEAD_API_PORT": "2000",
        "PITHEAD_DEVICE_PORT": "2001",
        "PITHEAD_NAMES": "a.example,b.example",
        "PITHEAD_TOKEN": "is the client's",
        "OTHER": "x",
    }
    settings = load(tmp_path, environment, {"device_port": 3001, "host": None})
    assert (settings.host, settings.api_port, settings.device_port) == ("file", 2000, 3001)
    assert settings.names == ("a.example", "b.example")
    assert settings.broker == "file"


def test_nothing_set_means_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, {}, {}).api_host == "127.0.0.1"
