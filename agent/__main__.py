"""The device's command line: ``pithead-agent``.

Each command imports what it needs when it runs: `serve` shall not pay for
the supervisor's parts, nor they for its.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from agent import huge_pages
from agent.core.layout import Layout
from contract.errors import PitheadError

EXAMPLES = """examples:
  pithead-agent enroll --server https://plant.example:8443 --token pj1.... --hardware raspberry-pi-4
  pithead-agent run                     keep this device as the fleet wants it
  pithead-agent status                  what runs where, and why
  pithead-agent status --json
  pithead-agent doctor                  what keeps this device from working
  pithead-agent serve models/           serve models here, without a fleet (see serve --help)
  pithead-agent probe packages/pump      what each variant costs on each accelerator here
  pithead-agent recalibrate LANE        fit a lane's model to its source anew
  pithead-agent check-source LANE       what the wires of a lane give, beside what its model wants
  pithead-agent bypass on               write nothing to any control any more, from this moment

SIGTERM and SIGINT end `run` and its engine; SIGHUP ends `run` alone: the
engine goes on, and the next `run` finds it.
"""


PROBE_EXAMPLES = """examples:
  pithead-agent probe packages/pump          a package: each variant against its golden vectors
  pithead-agent probe detector.tflite        a bare file: against the runtime's own kernels
  pithead-agent probe packages/pump --json | jq .choice
  PITHEAD_AGENT_ENGINE_THREADS=2 pithead-agent probe detector.onnx

`nodes` are those that the accelerator took, of all; what took none is not
used. The exit status is 1 when nothing passed. Accelerators of this device's
own stand in agent.toml, for example

  [accelerators.my-npu]
  format = "tflite"
  library = "/usr/lib/libmy_npu_delegate.so"
  options = { cores = 2 }
  devices = ["/dev/my-npu0"]
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it succeeded, 1 when a check failed, 2 for an error."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    if given[:1] == ["serve"]:
        if arguments is None:
            huge_pages.begin_again()
        from agent.engine.serve import command  # noqa: PLC0415 - has a parser of its own

        return command.main(given[1:])
    options = _parser().parse_args(given)
    layout = Layout(Path(options.root).absolute())
    try:
        return int(options.act(layout, options))
    except PitheadError as error:
        sys.stderr.write(f"{error}\n{error.remedy}\n")
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pithead-agent",
        description="Run models on this device, as its fleet wants it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--root",
        metavar="DIR",
        default=os.environ.get("PITHEAD_ROOT", "/"),
        help="where etc/pithead, var/lib/pithead and run/pithead lie (default: PITHEAD_ROOT or /)",
    )

    enroll = commands.add_parser("enroll", parents=[common], help="make this device known to a server")
    enroll.add_argument(
        "--server", required=True, metavar="URL", help="https://host:port of the devices' listener"
    )
    enroll.add_argument("--token", required=True, help="join token, pj1....")
    enroll.add_argument("--name", default="", help="a name for people, shown beside the id")
    enroll.add_argument("--hardware", default="unknown", help="kind of device, for example raspberry-pi-4")
    enroll.set_defaults(act=_enroll)

    run = commands.add_parser("run", parents=[common], help="run the supervisor and its engine")
    run.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="default: info"
    )
    run.set_defaults(act=_run)

    show = commands.add_parser("status", parents=[common], help="what runs where, and why")
    show.add_argument("--json", action="store_true", help="for programs")
    show.set_defaults(act=_status)

    again = commands.add_parser(
        "recalibrate", parents=[common], help="fit a lane's model anew, while the present fit serves"
    )
    again.add_argument("lane", metavar="LANE", help="name of a lane in agent.toml")
    again.set_defaults(act=_recalibrate)

    wires = commands.add_parser(
        "check-source", parents=[common], help="watch a lane's source for a few seconds"
    )
    wires.add_argument("lane", metavar="LANE", help="name of a lane in agent.toml")
    wires.add_argument("--seconds", type=float, default=5.0, metavar="S", help="how long (default: 5)")
    wires.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="of the model to come; default: of the version that serves, else the source's own tags",
    )
    wires.add_argument("--json", action="store_true", help="for programs")
    wires.set_defaults(act=_check_source)

    bypass = commands.add_parser(
        "bypass", parents=[common], help="stop all writes to controls of the plant, or allow them again"
    )
    bypass.add_argument("to", choices=["on", "off", "status"], help="on stops them within a second")
    bypass.add_argument("--why", default="", metavar="TEXT", help="for those who find it on")
    bypass.set_defaults(act=_bypass)

    doctor = commands.add_parser("doctor", parents=[common], help="check what this device needs")
    doctor.add_argument("--json", action="store_true", help="for programs")
    doctor.set_defaults(act=_doctor)

    probe = commands.add_parser(
        "probe",
        parents=[common],
        help="measure a model on all that this device has, and say what would be chosen",
        description="Try each variant on each accelerator in a sandbox: golden vectors, time and memory.",
        epilog=PROBE_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    probe.add_argument("model", type=Path, metavar="MODEL", help="a package's directory, or a model file")
    probe.add_argument("--json", action="store_true", help="for programs")
    probe.set_defaults(act=_probe)

    commands.add_parser("serve", add_help=False, help="serve models on this machine, without a fleet")
    return parser


def _enroll(layout: Layout, options: argparse.Namespace) -> int:
    from agent import wiring  # noqa: PLC0415 - see above

    identity, new = wiring.enrol(
        layout, server=options.server, token=options.token, name=options.name, hardware=options.hardware
    )
    already = "" if new else " already"
    sys.stdout.write(f"This device is{already} enrolled as {identity.device} with {identity.server}.\n")
    return 0


def _run(layout: Layout, options: argparse.Namespace) -> int:
    from agent import wiring  # noqa: PLC0415 - see above

    wiring.set_up_logging(options.log_level)
    wiring.run(layout)
    return 0


def _status(layout: Layout, options: argparse.Namespace) -> int:
    from agent import wiring  # noqa: PLC0415 - see above
    from agent.service import status  # noqa: PLC0415

    problems = []
    try:
        wiring.read_settings(layout)
    except PitheadError as error:
        problems.append(str(error))
    found = status.gather(layout, problems)
    if options.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(found)).decode() + "\n")
    else:
        sys.stdout.write(status.render(found))
    return 0


def _probe(layout: Layout, options: argparse.Namespace) -> int:
    from agent import wiring  # noqa: PLC0415 - see above
    from agent.service import probe  # noqa: PLC0415

    settings = wiring.read_settings(layout)
    require = settings.probe.require == "full"
    found = probe.examine(options.model, settings.accelerators, settings.engine, require_sandbox=require)
    sys.stdout.write(probe.as_json(found) if options.json else probe.render(found))
    return 0 if found.choice is not None else 1


def _recalibrate(layout: Layout, options: argparse.Namespace) -> int:
    from agent import wiring  # noqa: PLC0415 - see above

    wiring.recalibrate(layout, options.lane)
    sys.stdout.write(f"The lane {options.lane} is calibrated anew as soon as its agent runs.\n")
    return 0


def _check_source(layout: Layout, options: argparse.Namespace) -> int:
    from agent import wiring  # noqa: PLC0415 - what serves without a fleet needs none of it
    from agent.engine import check  # noqa: PLC0415 - numpy stays out of the supervisor

    live = sys.stdout.isatty() and not options.json

    def show(seen: check.SourceSeen) -> None:
        if live:
            text = check.render(seen)
            sys.stdout.write(f"\x1b[J{text}\x1b[{text.count(chr(10))}A")
            sys.stdout.flush()

    seen = wiring.check_source(layout, options.lane, options.seconds, options.manifest, show)
    if options.json:
        sys.stdout.write(msgspec.json.format(msgspec.json.encode(seen)).decode() + "\n")
    else:
        sys.stdout.write(("\x1b[J" if live else "") + check.render(seen))
    return 0 if seen.good else 1


def _bypass(layout: Layout, options: argparse.Namespace) -> int:
    from agent import wiring  # noqa: PLC0415 - see above
    from agent.service import bypass  # noqa: PLC0415

    if options.to != "status":
        wiring.bypass(layout, on=options.to == "on", why=options.why)
    sys.stdout.write(f"The bypass is {bypass.render(bypass.read(layout.bypass))}.\n")
    return 0


def _doctor(layout: Layout, options: argparse.Namespace) -> int:
    from agent import wiring  # noqa: PLC0415 - see above

    bad = False
    for finding in wiring.doctor(layout):
        bad = bad or finding.result == "failed"
        if options.json:
            sys.stdout.write(msgspec.json.encode(finding).decode() + "\n")
        else:
            remedy = f"\n{'':23}-> {finding.remedy}" if finding.remedy else ""
            sys.stdout.write(f"{finding.result:<8} {finding.check:<14} {finding.detail}{remedy}\n")
        sys.stdout.flush()
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
