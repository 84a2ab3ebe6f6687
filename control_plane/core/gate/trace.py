"""Evidence as text: recorded, simulated and stored evidence have one form.

JSON Lines: a header, then one line per bucket with a number or null for each
device; several metrics are several such blocks, one after the other. Instead
of null, ``"muted"`` says that the device had nothing to tell, since its
machine did not run.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Final, Literal

import msgspec
import numpy as np

from contract.errors import PitheadError
from control_plane.core.gate.evidence import Booleans, Evidence, Floats
from control_plane.core.gate.scores import muted

DEFAULT_SEED: Final = "replay"
_decode_line = msgspec.json.Decoder().decode
MUTED: Final = "muted"
Cell = float | Literal["muted"] | None
_decode_row = msgspec.json.Decoder(list[Cell]).decode


class Header(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a block is about. ``activated_at`` counts buckets; ``treated`` names the canaries."""

    metric: str
    devices: list[str | int]
    treated: list[str | int | bool]
    activated_at: int
    bucket_s: float = 60.0
    higher_is_worse: bool | None = None
    strata: list[str | int] | None = None
    seed: str = DEFAULT_SEED
    alpha_share: float = 1.0
    last: int | None = None
    may_advance: bool = True


class Trace(msgspec.Struct, frozen=True):
    """Evidence with what a trace says about its metrics."""

    evidence: Evidence
    bucket_s: float
    directions: dict[str, bool]
    """metric -> higher is worse, where the trace says so."""


def write(evidence: Evidence, *, bucket_s: float, directions: dict[str, bool]) -> Iterator[str]:
    """Yield the lines of ``evidence``; reading them gives the same evidence to the last digit."""
    encoder = msgspec.json.Encoder()
    silent = muted(evidence).T.tolist()
    for name, values in evidence.series.items():
        header = Header(
            metric=name,
            bucket_s=bucket_s,
            devices=list(evidence.devices),
            treated=[d for d, t in zip(evidence.devices, evidence.treated, strict=True) if t],
            activated_at=evidence.pre,
            higher_is_worse=directions.get(name),
            strata=list(evidence.strata),
            seed=evidence.seed,
            alpha_share=evidence.alpha_share,
            last=evidence.last,
            may_advance=evidence.may_advance,
        )
        yield encoder.encode(header).decode()
        for row, quiet in zip(np.asarray(values).T.tolist(), silent, strict=True):
            cells = [
                value if not math.isnan(value) else MUTED if q else None
                for value, q in zip(row, quiet, strict=True)
            ]
            yield encoder.encode(cells).decode()


def read(lines: Iterable[str]) -> Trace:
    """Return the trace in ``lines``; ``rollout.trace_invalid`` names the line and the field."""
    blocks: list[tuple[int, Header, list[list[Cell]]]] = []
    for number, text in enumerate(lines, start=1):
        line = text.strip()
        if not line:
            continue
        if line.startswith("["):
            if not blocks:
                raise _invalid(number, "a row of numbers before the first header")
            blocks[-1][2].append(_row(number, line, len(blocks[-1][1].devices)))
        else:
            blocks.append((number, _header(number, line), []))
    if not blocks:
        raise PitheadError("rollout.trace_invalid", "the trace is empty: no header")
    return _trace(blocks)


def _trace(blocks: list[tuple[int, Header, list[list[Cell]]]]) -> Trace:
    _, first, rows = blocks[0]
    devices = tuple(str(device) for device in first.devices)
    treated = _treated(blocks[0][0], first, devices)
    series: dict[str, Floats] = {}
    directions: dict[str, bool] = {}
    quiet: Booleans = np.zeros((len(devices), len(rows)), dtype=bool)
    for number, header, values in blocks:
        for field in ("devices", "treated", "strata", "activated_at", "bucket_s", "seed"):
            if getattr(header, field) != getattr(first, field):
                raise _invalid(number, f"{field}: differs from the first block's")
        if header.metric in series:
            raise _invalid(number, f"metric: {header.metric!r} comes twice")
        if len(values) != len(rows):
            raise _invalid(
                number, f"{len(values)} buckets of {header.metric!r}, {len(rows)} of {first.metric!r}"
            )
        if header.activated_at > len(values):
            raise _invalid(
                number, f"activated_at: {header.activated_at} lies behind the {len(values)} buckets"
            )
        numbers = [[None if cell == MUTED else cell for cell in row] for row in values]
        table = np.array(numbers, dtype=np.float64).reshape(len(values), len(devices))
        series[header.metric] = table.T
        cells = [[cell == MUTED for cell in row] for row in values]
        quiet |= np.array(cells, dtype=bool).reshape(len(values), len(devices)).T
        if header.higher_is_worse is not None:
            directions[header.metric] = header.higher_is_worse
    evidence = Evidence(
        seed=first.seed,
        devices=devices,
        treated=treated,
        strata=tuple(str(s) for s in first.strata) if first.strata is not None else ("all",) * len(devices),
        pre=first.activated_at,
        series=series,
        alpha_share=first.alpha_share,
        last=first.last,
        may_advance=first.may_advance,
        muted=quiet if quiet.any() else None,
    )
    return Trace(evidence=evidence, bucket_s=first.bucket_s, directions=directions)


def _header(number: int, line: str) -> Header:
    try:
        header = msgspec.convert(_decode_line(line), Header)
    except msgspec.ValidationError as error:
        raise _invalid(number, f"header: {error}") from error
    except msgspec.DecodeError as error:
        raise _invalid(number, f"not JSON: {error}") from error
    n = len(header.devices)
    if n == 0:
        raise _invalid(number, "devices: empty")
    if len({str(device) for device in header.devices}) != n:
        raise _invalid(number, "devices: a device comes twice")
    if header.strata is not None and len(header.strata) != n:
        raise _invalid(number, f"strata: {len(header.strata)} names for {n} devices")
    if header.activated_at < 0:
        raise _invalid(number, f"activated_at: {header.activated_at} is negative")
    if not 0 < header.alpha_share <= 1:
        raise _invalid(number, "alpha_share: must lie in (0, 1]")
    if header.last is not None and header.last < 1:
        raise _invalid(number, f"last: {header.last} is not a bucket after the activation")
    return header


def _row(number: int, line: str, devices: int) -> list[Cell]:
    try:
        row = _decode_row(line)
    except msgspec.ValidationError as error:
        raise _invalid(number, f'{error}; give numbers, null or "{MUTED}"') from error
    except msgspec.DecodeError as error:
        raise _invalid(number, f"not JSON (a missing value is null, never NaN): {error}") from error
    if len(row) != devices:
        raise _invalid(number, f"{len(row)} values for {devices} devices")
    return row


def _treated(number: int, header: Header, devices: tuple[str, ...]) -> tuple[bool, ...]:
    """Names of devices, or one boolean per device."""
    given = header.treated
    if given and all(isinstance(entry, bool) for entry in given):
        if len(given) != len(devices):
            raise _invalid(number, f"treated: {len(given)} booleans for {len(devices)} devices")
        return tuple(bool(entry) for entry in given)
    names = {str(entry) for entry in given}
    if len(names) != len(given):
        raise _invalid(number, "treated: a device comes twice; give names, or true and false for each device")
    unknown = names - set(devices)
    if unknown:
        raise _invalid(number, f"treated: {min(unknown)!r} is not among the devices")
    return tuple(device in names for device in devices)


def _invalid(number: int, what: str) -> PitheadError:
    return PitheadError("rollout.trace_invalid", f"line {number}: {what}", line=number)
