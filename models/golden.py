"""Golden vectors: recorded once by the maker of a model, checked by everybody who opens it.

The file is an ``.npz`` without pickles. ``in:<tensor>`` and ``out:<tensor>``
each have a leading axis of vectors; what follows is one call's tensor, its
own batch axis included.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contract.manifest import Tolerance
from inference.session import Session

Array = NDArray[Any]


def record(session: Session, feeds: Sequence[Mapping[str, Array]]) -> bytes:
    """Return the golden file of these inputs and what ``session`` makes of them; the same bytes each time."""
    session.reset()
    results = [session.run(feed) for feed in feeds]
    arrays = {f"in:{name}": _stacked([feed[name] for feed in feeds]) for name in feeds[0]}
    arrays |= {f"out:{name}": _stacked([result[name] for result in results]) for name in results[0]}
    file = BytesIO()
    # numpy's own parameter names cannot collide with names that hold a colon.
    np.savez(file, allow_pickle=False, **arrays)
    return file.getvalue()


def _stacked(arrays: Sequence[Array]) -> Array:
    """Return one array; texts become numpy's own kind, which needs no pickles."""
    stacked = np.stack(arrays)
    if stacked.dtype != np.object_:
        return stacked
    texts = [v.decode() if isinstance(v, bytes) else str(v) for v in stacked.ravel()]
    return np.array(texts, np.str_).reshape(stacked.shape)


def spread(sessions: Sequence[Session], feeds: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Return, by output, the largest difference of any session from the first, in the tensor's own units."""
    worst: dict[str, float] = {}
    for session in sessions:
        session.reset()
    for feed in feeds:
        first, *others = [session.run(feed) for session in sessions]
        for name, want in first.items():
            if want.dtype == np.object_:
                continue
            for other in others:
                delta = np.abs(other[name].astype(np.float64) - want.astype(np.float64))
                worst[name] = max(worst.get(name, 0.0), float(delta.max(initial=0.0)))
    return worst


def tolerances(session: Session, worst: Mapping[str, float]) -> dict[str, Tolerance]:
    """Return honest tolerances: what other kernels of this machine differ by, and at least one step or 1e-4.

    Kernels of other machines round differently too, so nothing is promised to be exact.
    """
    found = {}
    for spec in session.outputs:
        seen = worst.get(spec.name, 0.0)
        if spec.datatype == "BYTES":
            continue
        if spec.datatype.startswith("FP"):
            found[spec.name] = Tolerance(atol=max(1e-4, float(f"{2 * seen:.2g}")), rtol=1e-3)
        else:
            found[spec.name] = Tolerance(atol=max(1.0, seen))
    return found
