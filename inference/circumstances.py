"""Under which circumstances a choice by measurement holds: another system, runtime or driver needs another.

Light, and by looks alone: nothing is loaded.
"""

import platform
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from inference import registry
from inference.accelerators import NO_LIMITS, TABLES, CustomTable, Resources, find

_FOLDERS: Final = (
    "/usr/local/lib",
    f"/usr/lib/{sysconfig.get_config_var('MULTIARCH') or ''}",
    "/usr/lib",
    "/usr/lib64",
    "/vendor/lib64",
    "/opt/lib",
)
"""Where a library without a path lies, as a rule."""
_MODULES: Final = (
    *("nvidia", "mali_kbase", "galcore", "apex", "ethosu"),
    *("msm", "i915", "xe", "amdgpu", "intel_vpu"),
)
"""Kernel modules of accelerators; in a tree they carry the kernel's own version."""


def circumstances(
    custom: CustomTable | None = None, resources: Resources = NO_LIMITS, root: Path = Path("/")
) -> dict[str, str]:
    """Return what a choice depends on besides the model; two machines or days compare by ``==``.

    ``root`` is for tests. Values are short, and say for people what has changed.
    """
    found = {"kernel": platform.release(), "machine": platform.machine(), "system": _system(root)}
    found |= {f"runtime {name}": version for name, version in registry.installed().items()}
    found |= {f"module {name}": v for name in _MODULES if (v := _module(root, name))}
    for library in sorted(_libraries(custom)):
        if (seen := _library(root, library)) is not None:
            found[f"library {library}"] = seen
    if custom:
        found["settings accelerators"] = msgspec.json.encode(dict(custom), order="sorted").decode()
    if resources != NO_LIMITS:
        found["settings engine"] = msgspec.json.encode(resources).decode()
    return found


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, str]:
    """Return what has changed, as ``before -> now``."""
    return {
        key: f"{before.get(key, 'none')} -> {now.get(key, 'none')}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    }


def _libraries(custom: CustomTable | None) -> set[str]:
    built_in = [a for table in TABLES.values() for a in table]
    own = [find(c.format, name, custom) for name, c in (custom or {}).items()]
    return {a.library for a in (*built_in, *own) if a.library}


def _system(root: Path) -> str:
    wanted = ("ID=", "VERSION_ID=", "BUILD_ID=", "IMAGE_VERSION=")
    lines = _read(root / "etc/os-release").splitlines()
    return " ".join(line.partition("=")[2].strip('"') for line in lines if line.startswith(wanted))


def _module(root: Path, name: str) -> str:
    folder = root / "sys/module" / name
    return _read(folder / "version") or _read(folder / "srcversion")


def _library(root: Path, name: str) -> str | None:
    """Return size and time of change of a library, by its path or where libraries lie."""
    places = [name] if name.startswith("/") else [f"{folder}/{name}" for folder in _FOLDERS]
    for place in places:
        try:
            seen = (root / place.lstrip("/")).stat()
        except OSError:
            continue
        return f"{seen.st_size} bytes of {seen.st_mtime_ns}"
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip()[:4096]
    except OSError:
        return ""
