"""The local bypass: while its file exists, no control of this device is written.

It is made by ``pithead-agent bypass on``, or by ``touch`` where nothing else
works. Whoever looks does so right before a write; where it cannot be told
whether the file exists, it does.
"""

import os


def is_on(path: str) -> bool:
    """Return whether nothing may be written; without a path there is no bypass."""
    if not path:
        return False
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
