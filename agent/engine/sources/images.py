"""Pictures that a camera's program lays into a directory, each one window of the model.

A picture of width x height is a window of as many rows, one for each pixel
from the top left, and its colours are the channels: one for grey, three for
red, green and blue. Flattened sample by sample, as every window is, that is
the layout NHWC; a model in NCHW fits with one channel only. Values are those
of the file (0 to 255, or 0 to 65535 for 16 bits of grey), and the manifest's
mean and scale per channel normalise them.

Files that were there before the lane are left alone, and so is what is not
finished: write under another suffix, then rename. Where the lane does not
follow, the newest pictures count: older ones are left out, and counted.
"""

import logging
import stat
import threading
from collections import deque
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from agent.engine.clock import Clock
from agent.engine.sources.base import TICK_S, Batch, Source, Table, settings
from contract.errors import PitheadError
from contract.manifest import Pipeline

log = logging.getLogger(__name__)

FORMATS: Final = ("BMP", "JPEG", "PNG", "TIFF", "WEBP")
MAX_PIXELS: Final = 64_000_000
"""Of a file, before it is made smaller."""
GREY, COLOURS = 1, 3
CLOSE_S: Final = 2.0
PAUSE_S: Final = 0.01

Key = tuple[Any, ...]
"""What orders files: later ones are greater."""


class ImagesSettings(Struct, frozen=True, forbid_unknown_fields=True):
    """The lane's ``source`` table."""

    kind: Literal["images"]
    path: Annotated[str, Meta(min_length=1)]
    """The directory."""
    width: Annotated[int, Meta(ge=1, le=65536)]
    height: Annotated[int, Meta(ge=1, le=65536)]
    """What the model wants; ``width * height`` is the manifest's window."""
    suffixes: tuple[str, ...] = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")
    order: Literal["name", "time"] = "name"
    """By which a file is newer than another: its name, or its time of change."""
    fit: Literal["stretch", "crop", "pad"] = "stretch"
    """How a picture of another shape is brought to the model's."""
    existing: bool = False
    """Whether pictures that are there already are shown first, all of them."""
    poll_s: Annotated[float, Meta(ge=0.01, le=3600)] = 0.2
    max_waiting: Annotated[int, Meta(ge=1, le=100)] = 4
    """Pictures that may wait for the lane."""


SETTINGS: Final = ImagesSettings


class Directory:
    """Which files are new. Remembers one key, however many files there are."""

    def __init__(self, given: ImagesSettings) -> None:
        self._path, self._suffixes, self._order = Path(given.path), given.suffixes, given.order
        self._last: Key | None = None
        self._newest = 0
        """Time of the newest file, microseconds UTC."""
        self._complained = False
        if not given.existing:
            there = list(self._files())
            self._last = max((key for key, _, _ in there), default=None)
            self._newest = max((t for _, _, t in there), default=0)

    def new(self) -> list[tuple[Path, int]]:
        """Return files that came since the call before, and their times (microseconds UTC), oldest first."""
        found = []
        for key, path, t in self._files():
            if self._last is None or key > self._last:
                found.append((key, path, t))
            elif t > self._newest and key != self._last:
                self._say_not_newer(path)
        found.sort(key=lambda one: one[0])
        if found:
            self._last = found[-1][0]
            self._newest = max(self._newest, *(t for _, _, t in found))
        return [(path, t) for _, path, t in found]

    def _say_not_newer(self, path: Path) -> None:
        """A camera whose counter begins anew, or has no zeros before it, would be silent for ever."""
        if self._complained:
            return
        self._complained = True
        facts = {"file": path.name, "after": str(self._last[-1]) if self._last else ""}
        log.warning("source.name_not_newer", extra={"facts": facts})

    def _files(self) -> Iterator[tuple[Key, Path, int]]:
        """Raises ``OSError`` where the directory cannot be read."""
        for path in self._path.iterdir():
            if path.suffix.lower() not in self._suffixes:
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue  # it came and went
            if not stat.S_ISREG(status.st_mode):
                continue  # to open a pipe could take for ever
            by_time = self._order == "time"
            yield (
                (status.st_mtime_ns, path.name) if by_time else (path.name,),
                path,
                status.st_mtime_ns // 1000,
            )


class Decoder:
    """From a file to the rows of one window."""

    def __init__(self, given: ImagesSettings, channels: int) -> None:
        self._size, self._fit, self._channels = (given.width, given.height), given.fit, channels
        try:
            self._image: Any = import_module("PIL.Image")
            self._ops: Any = import_module("PIL.ImageOps")
        except ImportError as error:
            raise PitheadError(
                "source.failed", "images: Pillow is missing; install the extra `images`"
            ) from error

    def rows(self, path: Path) -> NDArray[np.float64]:
        """Return (height * width, channels); raises whatever Pillow raises, and ``ValueError``."""
        with self._image.open(path, formats=FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"{opened.width} x {opened.height} pixels, at most {MAX_PIXELS}")
            upright = self._ops.exif_transpose(opened)
        picture = self._fitted(self._coloured(upright))
        rows = np.asarray(picture, np.float64).reshape(-1, self._channels)
        return np.ascontiguousarray(rows)

    def _coloured(self, picture: Any) -> Any:
        if self._channels == COLOURS:
            return picture.convert("RGB")
        deep = picture.mode.startswith(("I", "F"))
        return picture.convert("F" if deep else "L")

    def _fitted(self, picture: Any) -> Any:
        if picture.size == self._size:
            return picture
        how = self._image.Resampling.BILINEAR
        if self._fit == "crop":
            return self._ops.fit(picture, self._size, how)
        if self._fit == "pad":
            return self._ops.pad(picture, self._size, how)
        return picture.resize(self._size, how)


class ImagesSource:
    """A thread decodes, the lane takes slices."""

    def __init__(self, given: ImagesSettings, channels: int, clock: Clock) -> None:
        self._given, self._clock, self._width = given, clock, channels
        self._rows_each = given.width * given.height
        self._decoder = Decoder(given, channels)
        try:
            self._directory = Directory(given)
        except OSError as error:
            raise PitheadError("source.failed", f"images {given.path}: {error.strerror}") from error
        self._lock = threading.Lock()
        self._waiting: deque[tuple[int, NDArray[np.float64]]] = deque()
        self._lost = 0
        self._taken = 0
        """Rows of the first picture that the lane has."""
        self._problem: str | None = None
        self._complained = False
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="source-images", daemon=True)
        self._thread.start()

    def poll(self, limit: int) -> Batch | None:
        """See ``Source``."""
        with self._lock:
            lost, self._lost = self._lost, 0
            if not self._waiting:
                if self._problem is not None and not lost:
                    raise PitheadError("source.failed", f"images {self._given.path}: {self._problem}")
                return Batch(np.empty((0, self._width)), np.empty(0, np.int64), lost=lost)
            t, picture = self._waiting[0]
            first = self._taken
            rows = picture[first : first + limit]
            self._taken += len(rows)
            if self._taken == len(picture):
                self._waiting.popleft()
                self._taken = 0
        return Batch(rows, np.full(len(rows), t, np.int64), lost=lost, continues=first > 0)

    def wait_s(self) -> float:
        """See ``Source``."""
        return 0.0 if self._waiting else TICK_S

    def backlog(self) -> int:
        """See ``Source``."""
        with self._lock:
            return sum(len(picture) for _, picture in self._waiting) - self._taken

    def close(self) -> None:
        """See ``Source``."""
        self._stopping.set()
        self._thread.join(CLOSE_S)

    # ---- on the own thread

    def _run(self) -> None:
        try:
            if self._given.existing:
                self._look(patient=True)
            while not self._stopping.is_set():
                self._look()
                self._stopping.wait(self._given.poll_s)
        except OSError as error:
            self._problem = error.strerror or str(error)
        except Exception as error:
            # Whatever ends this thread ends the source: said here, since nobody else sees it.
            log.exception("source.broke", extra={"facts": {"source": "images"}})
            self._problem = f"{type(error).__name__}: {error}"

    def _look(self, *, patient: bool = False) -> None:
        """Decode what is new; of more than may wait the newest, unless ``patient``."""
        files = self._directory.new()
        over = 0 if patient else max(0, len(files) - self._given.max_waiting)
        self._miss(over)
        for path, t in files[over:]:
            while patient and len(self._waiting) >= self._given.max_waiting:
                if self._stopping.wait(PAUSE_S):
                    return
            if self._stopping.is_set():
                return
            try:
                rows = self._decoder.rows(path)
            except FileNotFoundError:
                self._miss(1)
                continue
            except Exception as error:  # noqa: BLE001 - a file can break a decoder in any way
                self._miss(1)
                if not self._complained:
                    self._complained = True
                    facts = {"file": path.name, "detail": f"{type(error).__name__}: {error}"[:500]}
                    log.warning("source.bad_image", extra={"facts": facts})
                continue
            self._put(min(t, self._clock.wall()), rows)

    def _put(self, t: int, rows: NDArray[np.float64]) -> None:
        with self._lock:
            self._waiting.append((t, rows))
            while len(self._waiting) > self._given.max_waiting:
                # The first may be half taken: then the second goes.
                place = 1 if self._taken and len(self._waiting) > 1 else 0
                del self._waiting[place]
                self._lost += self._rows_each

    def _miss(self, pictures: int) -> None:
        with self._lock:
            self._lost += pictures * self._rows_each


def open_source(table: Table, pipeline: Pipeline, clock: Clock) -> Source:
    """Open the directory; ``config.invalid`` where the model takes no pictures of this size."""
    given = settings(table, ImagesSettings)
    channels, pixels = len(pipeline.channels), given.width * given.height
    if channels not in {GREY, COLOURS}:
        raise PitheadError(
            "config.invalid",
            f"lanes.source.kind images has 1 or 3 channels, the model {channels}",
            key="kind",
        )
    if (pipeline.window, pipeline.stride) != (pixels, pixels):
        raise PitheadError(
            "config.invalid",
            f"lanes.source.width times height is {pixels}; the model's window is {pipeline.window}, "
            f"its stride {pipeline.stride}, and both must be the same",
            key="width",
        )
    return ImagesSource(given, channels, clock)
