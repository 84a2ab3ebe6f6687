"""What a device and the update server say to each other over HTTPS.

Paths are under ``/device/v1``. Only ``ca`` and ``enrol`` are open to a client
without a certificate.
"""

from typing import Annotated

from msgspec import Meta, Struct

from contract.messages import NO_NUL, Label, Micros, Sha256

CA_PATH = "/device/v1/ca"
ENROL_PATH = "/device/v1/enrol"
BUNDLE_PATH = "/device/v1/bundle"
ARTIFACT_PATH = "/device/v1/artifacts/"
"""Followed by the SHA-256 of the file, in hex. Answers ``Range`` requests."""


class RepositoryMetadata(Struct, frozen=True):
    """The metadata files of one TUF repository, byte for byte as they were signed.

    ``roots`` holds every version from 1 on, in order; ``delegated`` is keyed
    by role name.
    """

    roots: tuple[bytes, ...]
    timestamp: bytes
    snapshot: bytes
    targets: bytes
    delegated: dict[str, bytes] = {}


class Bundle(Struct, frozen=True):
    """All the metadata that one device needs, in one answer (msgpack); its ETag is its SHA-256."""

    director: RepositoryMetadata
    image: RepositoryMetadata


class DeviceFacts(Struct, frozen=True, omit_defaults=True):
    """What a device says of itself when it enrols. Used to choose variants and strata, never to authorise."""

    hardware: Annotated[str, Meta(max_length=64, pattern=NO_NUL)] = "unknown"
    arch: Annotated[str, Meta(max_length=32, pattern=NO_NUL)] = "unknown"
    accelerators: Annotated[tuple[Label, ...], Meta(max_length=100)] = ("cpu",)
    agent_version: Annotated[str, Meta(max_length=64, pattern=NO_NUL)] = ""
    name: Annotated[str, Meta(max_length=64, pattern=NO_NUL)] = ""
    """A name that the technician gives, to be shown beside the id."""


class EnrolRequest(Struct, frozen=True):
    """A join token and a PKCS#10 request (PEM). The subject of the request is ignored."""

    token: Annotated[str, Meta(max_length=256, pattern=NO_NUL)]
    csr: Annotated[str, Meta(max_length=8192, pattern=NO_NUL)]
    facts: DeviceFacts


class EnrolResponse(Struct, frozen=True):
    """The device's identity and the anchors of its trust. Certificates are PEM."""

    device: str
    certificate: str
    """The device's certificate, followed by the device CA's."""
    server_ca: str
    image_root: bytes
    director_root: bytes
    broker_host: str
    broker_port: int
    time: Micros


def artifact_path(sha256: Sha256) -> str:
    """Path of an artifact by its hash."""
    return ARTIFACT_PATH + sha256
