"""Foreign exceptions that become ours, so that a code is all that the rest of the agent sees."""

import errno

from contract.errors import PitheadError

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def from_os(error: OSError, doing: str) -> PitheadError:
    """Return our error for a failed write or read; ``doing`` says at what."""
    code = "storage.full" if error.errno in FULL else "storage.failed"
    return PitheadError(code, f"{doing}: {error.strerror or error}", errno=error.errno)
