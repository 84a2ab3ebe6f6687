"""``python -m models.apart FOLDER PROGRAM ...``: become another program, confined to a folder for its writes.

Converters run in an interpreter that has nothing of this project, so what
confines them must be in force before they begin.
"""

import os
import sys

from inference.sandbox import confine_program

STRICT = "--strict"
UNCONFINED = 77
"""Exit status where a layer is missing and ``--strict`` was given."""


def main() -> None:
    """Confine this process, and become the program."""
    strict = sys.argv[1] == STRICT
    folder, *program = sys.argv[2:] if strict else sys.argv[1:]
    missing = confine_program(folder)
    if missing and strict:
        sys.exit(UNCONFINED)
    os.execv(program[0], program)  # noqa: S606 - what the caller named, without a shell


if __name__ == "__main__":
    main()
