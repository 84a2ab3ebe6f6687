"""The images source: real files, really decoded."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from agent.engine.feed import needs
from agent.engine.sources import check, open_source
from agent.engine.sources.base import Source
from contract.errors import PitheadError
from contract.manifest import Channel, Pipeline
from tests.engine.conftest import Engine, make_package, until
from tests.engine.test_mqtt import CLOCK

WIDTH, HEIGHT = 40, 30
PIXELS = WIDTH * HEIGHT


def pipeline(channels: int = 3, window: int = PIXELS, stride: int | None = None) -> Pipeline:
    names = ("red", "green", "blue")[:channels] if channels != 1 else ("grey",)
    channel = tuple(Channel(n, minimum=0.0, maximum=255.0) for n in names)
    return Pipeline(channel, window, stride or window, (0.0,) * channels, (1.0,) * channels)


def picture(seed: int = 0, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, shape or (HEIGHT, WIDTH, 3), np.uint8)


def save(path: Path, pixels: np.ndarray[Any, Any]) -> Path:
    """As a camera's program should: under another suffix, then renamed."""
    part = path.with_suffix(".part")
    Image.fromarray(pixels).save(part, format="PNG")
    return part.rename(path)


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Callable[..., Source]]:
    held: list[Source] = []

    def opening(shape: Pipeline | None = None, **table: Any) -> Source:
        given = {"kind": "images", "path": str(tmp_path), "width": WIDTH, "height": HEIGHT, "poll_s": 0.02}
        held.append(open_source(given | table, shape or pipeline(), CLOCK))
        return held[-1]

    yield opening
    for one in held:
        one.close()
        one.close()


class Seen:
    """Whole pictures, put together from slices of 500 rows."""

    def __init__(self, source: Source) -> None:
        self.source, self.lost = source, 0
        self.pictures: list[Any] = []
        self.times: list[int] = []
        self._rows: list[Any] = []

    def poll(self) -> int:
        batch = self.source.poll(500)
        assert batch is not None
        self.lost += batch.lost
        if len(batch.t):
            assert len(batch.t) <= 500
            assert batch.continues == bool(self._rows), "no window reaches over two pictures"
            self._rows.append(batch.values)
            self.times.append(int(batch.t[0]))
            if sum(map(len, self._rows)) == PIXELS:
                self.pictures.append(np.concatenate(self._rows))
                self._rows = []
        return len(self.pictures)

    def until(self, pictures: int) -> list[Any]:
        until(lambda: self.poll() >= pictures, f"{pictures} pictures")
        return self.pictures


def test_a_picture_is_a_window_from_the_top_left(tmp_path: Path, opened: Callable[..., Source]):
    save(tmp_path / "000.png", picture(9))
    seen = Seen(opened())
    first, second = picture(1), picture(2)
    save(tmp_path / "001.png", first)
    seen.until(1)
    save(tmp_path / "002.png", second)
    found = seen.until(2)
    assert np.array_equal(found[0], first.reshape(-1, 3))
    assert np.array_equal(found[1].reshape(HEIGHT, WIDTH, 3), second)
    assert seen.lost == 0
    assert abs(seen.times[-1] - CLOCK.wall()) < 10_000_000


def test_grey_of_8_and_of_16_bits(tmp_path: Path, opened: Callable[..., Source]):
    seen = Seen(opened(pipeline(1)))
    grey = picture(1, HEIGHT, WIDTH)
    save(tmp_path / "1.png", grey)
    assert np.array_equal(seen.until(1)[0].reshape(HEIGHT, WIDTH), grey)
    deep = picture(2, HEIGHT, WIDTH).astype(np.uint16) * 256
    save(tmp_path / "2.png", deep)
    assert np.array_equal(seen.until(2)[1].reshape(HEIGHT, WIDTH), deep)


@pytest.mark.parametrize(
    ("fit", "edge", "middle"),
    [("stretch", 200.0, 200.0), ("crop", 200.0, 200.0), ("pad", 0.0, 200.0)],
)
def test_another_shape_is_brought_to_the_model_s(
    tmp_path: Path, opened: Callable[..., Source], fit: str, edge: float, middle: float
):
    seen = Seen(opened(fit=fit))
    save(tmp_path / "1.png", np.full((100, 400, 3), 200, np.uint8))
    found = seen.until(1)[0].reshape(HEIGHT, WIDTH, 3)
    assert found[0, 0, 0] == edge
    assert found[HEIGHT // 2, WIDTH // 2, 0] == middle


def test_a_picture_that_was_held_upright_is_turned(tmp_path: Path, opened: Callable[..., Source]):
    seen = Seen(opened())
    pixels = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
    pixels[:5] = 255  # its top, which lies left once it is turned
    turned = Image.Exif()
    turned[0x0112] = 8
    Image.fromarray(pixels).save(tmp_path / "a.part", format="PNG", exif=turned)
    (tmp_path / "a.part").rename(tmp_path / "a.png")
    found = seen.until(1)[0].reshape(HEIGHT, WIDTH, 3)
    assert found[:, :5].min() == 255
    assert found[:, 5:].max() == 0


def test_the_order_is_the_name_s_or_the_time_s(tmp_path: Path, opened: Callable[..., Source]):
    by_name, by_time = Seen(opened()), Seen(opened(order="time"))
    save(tmp_path / "5.png", picture(5))
    by_name.until(1)
    by_time.until(1)
    older = save(tmp_path / "3.png", picture(3))
    save(tmp_path / "7.png", picture(7))
    os.utime(older, (2_000_000_000, 2_000_000_000))
    assert np.array_equal(by_name.until(2)[1], picture(7).reshape(-1, 3))
    by_time.until(2)
    until(lambda: by_time.poll() >= 3 or by_time.lost, "both are newer by time")
    assert by_name.poll() == 2


def test_what_was_there_is_shown_only_when_asked_for_and_then_all_of_it(
    tmp_path: Path, opened: Callable[..., Source]
):
    for i in range(12):
        save(tmp_path / f"{i:03}.png", picture(i))
    found = Seen(opened(existing=True)).until(12)
    assert all(np.array_equal(found[i], picture(i).reshape(-1, 3)) for i in range(12))
    fresh = Seen(opened())
    save(tmp_path / "100.png", picture(100))
    assert np.array_equal(fresh.until(1)[0], picture(100).reshape(-1, 3))


def test_where_the_lane_does_not_follow_the_newest_count(tmp_path: Path, opened: Callable[..., Source]):
    seen = Seen(opened(max_waiting=2))
    for i in range(6):
        save(tmp_path / f"{i}.png", picture(i))
        until(lambda i=i: seen.source.backlog() >= min(i + 1, 2) * PIXELS, "it is decoded")
    until(
        lambda: (seen.poll(), seen.lost + len(seen.pictures) * PIXELS == 6 * PIXELS)[1], "all are accounted"
    )
    assert np.array_equal(seen.pictures[-1], picture(5).reshape(-1, 3))
    assert len(seen.pictures) in {2, 3}


def test_a_file_that_is_no_picture_is_missing(
    tmp_path: Path, opened: Callable[..., Source], caplog: pytest.LogCaptureFixture
):
    seen = Seen(opened())
    (tmp_path / "1.png").write_bytes(b"not a picture")
    (tmp_path / "2.png").write_bytes(save(tmp_path / "0.bin", picture(0)).read_bytes()[:500])
    (tmp_path / "3.gif").write_bytes(b"nobody asked for it")
    until(lambda: (seen.poll(), seen.lost >= 2 * PIXELS)[1], "two are missing")
    save(tmp_path / "4.png", picture(4))
    seen.until(1)
    assert seen.lost == 2 * PIXELS
    assert [r.getMessage() for r in caplog.records] == ["source.bad_image"]


def test_a_picture_that_is_too_large_is_missing(
    tmp_path: Path, opened: Callable[..., Source], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("agent.engine.sources.images.MAX_PIXELS", PIXELS)
    seen = Seen(opened())
    save(tmp_path / "1.png", picture(1, HEIGHT + 1, WIDTH, 3))
    until(lambda: (seen.poll(), seen.lost)[1], "it is missing")


def test_a_directory_that_goes_is_a_failed_source(tmp_path: Path, opened: Callable[..., Source]):
    gone = tmp_path / "camera"
    gone.mkdir()
    source = opened(path=str(gone))
    gone.rmdir()
    with pytest.raises(PitheadError, match="No such file") as caught:
        until(lambda: source.poll(1) and None, "never")
    assert caught.value.code == "source.failed"
    with pytest.raises(PitheadError, match="No such file"):
        opened(path=str(gone))


def test_a_lane_scores_each_picture_once(tmp_path: Path, engine: Engine):
    channels = pipeline().channels
    package = make_package(tmp_path / "p", window=48, stride=48, channels=channels)
    camera = tmp_path / "camera"
    camera.mkdir()
    for i in range(5):
        save(camera / f"{i}.png", picture(i, 60, 80, 3))
    supervisor = engine.connect()
    table = {"kind": "images", "path": str(camera), "width": 8, "height": 6, "existing": True}
    supervisor.configure(package.spec(table | {"poll_s": 0.02}))
    supervisor.until(lambda: (state := supervisor.state()) and state.windows == 5, "five pictures")
    save(camera / "9.png", picture(9, 60, 80, 3))
    supervisor.until(lambda: supervisor.state().windows == 6, "one more")


def test_a_model_of_another_size_needs_the_source_anew():
    table = {"kind": "images"}
    assert needs(pipeline(), table) == needs(pipeline(), table)
    assert needs(pipeline(), table) != needs(pipeline(window=64), table)
    assert needs(pipeline(), {"kind": "replay"}) == needs(pipeline(window=64), {"kind": "replay"})


@pytest.mark.parametrize(
    ("changes", "shape", "words"),
    [
        ({"width": 41}, pipeline(), "1230; the model's window is 1200"),
        ({}, pipeline(stride=1), "its stride 1"),
        ({}, pipeline(channels=2), "1 or 3 channels, the model 2"),
        ({"fit": "zoom"}, pipeline(), "fit"),
        ({"max_waiting": 0}, pipeline(), "max_waiting"),
        ({"widht": 1}, pipeline(), "widht"),
    ],
)
def test_what_is_wrong_is_named(
    opened: Callable[..., Source], changes: dict[str, Any], shape: Pipeline, words: str
):
    with pytest.raises(PitheadError) as caught:
        opened(shape, **changes)
    assert caught.value.code == "config.invalid"
    assert words in caught.value.detail


def test_settings_can_be_checked_without_a_directory():
    check({"kind": "images", "path": "/no/such", "width": 8, "height": 8})
