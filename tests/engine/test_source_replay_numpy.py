"""Recordings in NumPy's own files give the rows that they hold, or say what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agent.engine.sources import open_source
from contract.errors import PitheadError
from tests.engine.conftest import CHANNELS, samples
from tests.engine.test_sources import PIPELINE, HeldClock, take

ROWS = samples(50)
RECORDS = np.array([tuple(row) for row in ROWS], dtype=[(n, "f4" if n == "b" else "f8") for n in CHANNELS])


def npy(array: Any) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        np.save(directory / "r.npy", array)
        return directory / "r.npy"

    return make


def npz(**arrays: Any) -> Callable[[Path], Path]:
    def make(directory: Path) -> Path:
        np.savez_compressed(directory / "r.npz", **arrays)
        return directory / "r.npz"

    return make


def replayed(path: Path, **changes: Any) -> Any:
    held = HeldClock()
    table = {"kind": "replay", "path": str(path), "loop": False, "buffer_s": 60.0} | changes
    source = open_source(table, PIPELINE, held.clock)
    held.move(10)
    return take(source).values


@pytest.mark.parametrize(
    "make",
    [
        npy(ROWS),
        npy(np.asfortranarray(ROWS)),
        npy(RECORDS),
        npz(data=ROWS),
        npz(a=ROWS[:, 0], b=ROWS[:, 1], c=ROWS[:, 2], label=np.array(["x"] * 50)),
    ],
)
def test_every_form_gives_the_same_rows(tmp_path: Path, make: Callable[[Path], Path]):
    assert np.allclose(replayed(make(tmp_path)), ROWS, rtol=1e-6)


def test_columns_by_name_and_by_number(tmp_path: Path):
    wide = np.hstack([np.zeros((50, 1)), ROWS]).astype(np.float32)
    found = replayed(npy(wide)(tmp_path), columns=["3", "1", "2"])
    assert np.allclose(found, ROWS[:, [2, 0, 1]])
    found = replayed(npz(x=ROWS[:, 0], b=ROWS[:, 1], c=ROWS[:, 2])(tmp_path), columns=["x", "b", "x"])
    assert np.allclose(found, ROWS[:, [0, 1, 0]])


def test_integers_and_booleans_are_numbers_and_nan_is_missing(tmp_path: Path):
    arrays = {"a": np.arange(3), "b": np.array([True, False, True]), "c": np.array([1.0, np.nan, 2.0])}
    found = replayed(npz(**arrays)(tmp_path))
    assert np.array_equal(found, [[0, 1, 1], [1, 0, np.nan], [2, 1, 2]], equal_nan=True)


@pytest.mark.parametrize(
    ("make", "changes", "words"),
    [
        (npy(ROWS[:, :2]), {}, "has 2 columns, the model 3 channels"),
        (npy(ROWS), {"columns": ["0", "1", "7"]}, "no column 7"),
        (npy(ROWS[None]), {}, "has 3 axes"),
        (npy(np.array(5.0)), {}, "has 0 axes"),
        (npy(RECORDS[["a", "b"]]), {}, "no column 'c'"),
        (npy(np.array([["x", "y", "z"]])), {}, "no numbers"),
        (npy(np.array([[1j, 2, 3]])), {}, "no numbers"),
        (npy(np.array([{"a": 1}], dtype=object)), {}, "Python objects"),
        (npy(ROWS[:0]), {}, "has no rows"),
        (npz(a=ROWS[:, 0], b=ROWS[:, 1]), {}, "no column 'c'"),
        (npz(a=ROWS[:, 0], b=ROWS[:, 1], c=ROWS[:7, 2]), {}, "'c' has shape (7,), not (50,)"),
        (npz(), {}, "no column 'a'"),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, make: Callable[[Path], Path], changes: dict[str, Any], words: str
):
    with pytest.raises(PitheadError) as caught:
        replayed(make(tmp_path), **changes)
    assert caught.value.code == "source.failed"
    assert words in caught.value.detail
    assert "/r.np" in caught.value.detail


@pytest.mark.parametrize("name", ["r.npy", "r.npz"])
def test_a_file_that_is_cut_off_or_none_fails(tmp_path: Path, name: str):
    whole = (npy(ROWS) if name == "r.npy" else npz(data=ROWS))(tmp_path).read_bytes()
    for content in (whole[:200], b"not NumPy", b""):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PitheadError, match=r"source\.failed"):
            replayed(tmp_path / name)
    (tmp_path / name).unlink()
    with pytest.raises(PitheadError, match="No such file"):
        replayed(tmp_path / name)


@pytest.mark.parametrize(
    "make", [npy(ROWS), npy(RECORDS), npz(data=ROWS), npz(a=ROWS[:, 0], b=ROWS[:, 1], c=ROWS[:, 2])]
)
def test_a_file_that_is_too_large_is_not_held(
    tmp_path: Path, make: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agent.engine.sources.replay.MAX_VALUES", 149)
    with pytest.raises(PitheadError, match="more than 149 values"):
        replayed(make(tmp_path))
