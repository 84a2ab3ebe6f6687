"""``make fuzz``: each decoder for a while under atheris, in an environment of its own.

``python tests/fuzz/run.py --seconds 300 [TARGET ...]`` shares the time out.
The corpus stays below ``build/fuzz``; what broke something lies beside it.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
from tests.serve.environments import NotInstallableError, environment  # noqa: E402 - as a script

TARGETS = ("rest", "http", "grpc", "contract")
ONE_INPUT_S, LONGEST, MEMORY_MB = 10, 4096, 2048


def main() -> int:
    """Return how many targets broke; 2 where the fuzzer is not to be had for this Python."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"default: {' '.join(TARGETS)}")
    parser.add_argument("--seconds", type=int, default=300, help="for all targets together; default: 300")
    options = parser.parse_args()
    try:
        python = environment("fuzz")
    except NotInstallableError as error:
        version = ".".join(map(str, sys.version_info[:2]))
        sys.stderr.write(f"no atheris for Python {version} here: {error}\n")
        return 2
    broken, targets = 0, options.targets or TARGETS
    for target in targets:
        place = ROOT / "build" / "fuzz" / target
        place.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(
            [
                *(str(python), str(ROOT / "tests" / "fuzz" / "harness.py"), target, str(place / "corpus")),
                *(f"-max_total_time={options.seconds // len(targets)}", f"-max_len={LONGEST}"),
                *(f"-timeout={ONE_INPUT_S}", f"-rss_limit_mb={MEMORY_MB}", f"-artifact_prefix={place}/"),
                *("-print_final_stats=1", "-verbosity=1"),
            ],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
        lines = done.stderr.splitlines()
        runs = next((x.split()[-1] for x in lines if "number_of_executed_units" in x), "0")
        sys.stdout.write(f"{target:<10}{runs:>12} inputs  {'broken' if done.returncode else 'sound'}\n")
        if done.returncode:
            broken += 1
            sys.stdout.write("\n".join(lines[-60:]) + "\n")
    return min(broken, 1)


if __name__ == "__main__":
    sys.exit(main())
