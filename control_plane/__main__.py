"""The command ``pithead``."""

from typing import Final

from control_plane.cli.app import Lazy, build_app, run

COMMANDS: Final = {
    "init": Lazy("control_plane.wiring.commands:init_app", "Make a site in a data directory."),
    "serve": Lazy("control_plane.wiring.commands:serve_app", "Run the control plane."),
    "broker": Lazy("control_plane.wiring.commands:broker_app", "Run the site's broker."),
    "devices": Lazy("control_plane.cli.devices:devices_app", "What runs where, and why."),
    "groups": Lazy("control_plane.cli.groups:groups_app", "Groups of devices, by their labels."),
    "tokens": Lazy("control_plane.cli.tokens:tokens_app", "Tokens for joining devices and for the API."),
    "anomalies": Lazy("control_plane.cli.telemetry:anomalies_app", "What the models have found."),
    "events": Lazy("control_plane.cli.telemetry:events_app", "What people and the control plane did."),
    "release": Lazy("control_plane.cli.release:release_app", "Sign a model package and publish it."),
    "rollouts": Lazy("control_plane.cli.rollouts:rollouts_app", "Bring versions to devices, by stages."),
}
OTHERS: Final = {
    "demo": "Show the whole story on this machine.",
    "keys": "Hold the ceremony of the signing keys.",
    "models": "Build, look at and check model packages.",
}


def main() -> None:
    """Run the command line."""
    run(build_app(COMMANDS, OTHERS))


if __name__ == "__main__":
    main()
