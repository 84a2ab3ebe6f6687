"""Which variants of a model are worth a probe on this device, and in which order."""

from collections.abc import Collection

from contract.manifest import Manifest, Variant


def candidates(
    manifest: Manifest, *, arch: str, formats: Collection[str], accelerators: Collection[str]
) -> tuple[Variant, ...]:
    """Return the variants that this device could run, the most preferred first.

    ``arch`` is ``platform.machine()``; ``formats`` those for which a runtime
    is installed. Equal preferences keep the order of the manifest. The probe
    has the last word.
    """
    fitting = [
        v
        for v in manifest.variants
        if v.format in formats
        and ("any" in v.arch or arch in v.arch)
        and set(v.accelerators) & set(accelerators)
    ]
    return tuple(sorted(fitting, key=lambda v: -v.preference))
