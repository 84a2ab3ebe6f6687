"""Ask the C library for large pages, where a process loads and frees models.

Who frees a model does so with the interpreter's lock held, and 500 MB in pages of 4 KiB take about 35 ms, in
which nobody is answered; in large pages they take 2 ms. glibc reads this once, when a process begins
(https://sourceware.org/glibc/manual/2.36/html_node/Memory-Allocation-Tunables.html); others ignore it.
"""

import os
import sys
from collections.abc import Mapping
from typing import Final

VARIABLE: Final = "GLIBC_TUNABLES"
TUNABLE: Final = "glibc.malloc.hugetlb"


def environment(before: Mapping[str, str]) -> dict[str, str]:
    """Return ``before`` for a process with large pages; what a person has said of them stands."""
    said = [part for part in before.get(VARIABLE, "").split(":") if part]
    if not any(part.startswith(f"{TUNABLE}=") for part in said):
        said.append(f"{TUNABLE}=1")
    return {**before, VARIABLE: ":".join(said)}


def begin_again() -> None:
    """Become the same command with large pages, unless this is it; some 20 ms, so come early."""
    wanted = environment(os.environ)
    if sys.platform == "linux" and wanted[VARIABLE] != os.environ.get(VARIABLE):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], wanted)  # noqa: S606 - our own command
