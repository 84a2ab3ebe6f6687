"""The whole control plane as one object: made from its parts, started, served, stopped."""

import contextlib
import logging
import ssl
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

from fastapi import FastAPI
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from uvicorn import Config

from contract.errors import PitheadError
from control_plane.api import (
    bundle,
    devices,
    enrol,
    events,
    groups,
    health,
    releases,
    rollouts,
    telemetry,
    tokens,
)
from control_plane.api.app import devices_app, operators_app
from control_plane.api.mtls import device_config, server_context
from control_plane.ingest.mqtt import BrokerAddress, Ingest
from control_plane.ingest.writer import Writer
from control_plane.services import admission
from control_plane.services.access import Access
from control_plane.services.devices import Devices
from control_plane.services.director import Director
from control_plane.services.enrolment import Enrolment
from control_plane.services.image_repository import ImageRepository
from control_plane.services.releases import Releases
from control_plane.services.rollouts import Rollouts
from control_plane.services.rollouts_worker import Progress
from control_plane.services.staging import Staging
from control_plane.services.telemetry import Telemetry
from control_plane.settings import Settings
from control_plane.signing.client import SignerClient
from control_plane.store.database import Database
from control_plane.wiring.clock import now_micros
from control_plane.wiring.layout import Layout
from control_plane.wiring.listeners import Listener, bind, serve
from control_plane.wiring.revocations import SiteBroker
from control_plane.wiring.signer import SignerProcess
from control_plane.wiring.site import open_database, write_broker
from control_plane.workers.hints import HintPublisher
from control_plane.workers.loop import Task, Workers
from control_plane.workers.retention import Retention
from control_plane.workers.revocations import RevocationLists
from control_plane.workers.rollouts import RolloutWorker
from provisioning import broker, pki

log = logging.getLogger(__name__)


class ControlPlane:
    """One process of the control plane for one data directory."""

    def __init__(self, layout: Layout, settings: Settings) -> None:
        require_site(layout)
        self.layout = layout
        self.settings = settings
        self.database = open_database(layout, settings)
        listen = layout.signer_socket()
        self.signer = SignerProcess(listen, layout.signer_keys)
        self.signer_client = SignerClient(listen)
        self.images = ImageRepository(self.database, self.signer_client, layout.tuf, now_micros)
        self.director = Director(self.database, self.signer_client, self.images, now_micros)
        self.releases = Releases(
            self.database,
            self.images,
            layout.objects,
            Staging(layout.staging, settings.quota_bytes),
            now_micros,
            partial(admission.validate, require_sandbox=settings.require_sandbox),
        )
        self.access = Access(self.database, now_micros)
        self.devices = Devices(self.database, now_micros, revoked=self._revoked)
        if layout.site.renew(layout.server_names(settings), pki.moment(now_micros())):
            write_broker(layout, settings, self.devices.revocations())
        self.enrolment = Enrolment(
            self.database,
            now_micros,
            device_authority=layout.site.device_authority,
            server_authority=layout.site.server_authority,
            anchors=_Anchors(self.images, self.database),
            broker=(settings.broker, settings.broker_port),
            certificate_days=settings.certificate_days,
        )
        self.telemetry = Telemetry(self.database)
        self.rollouts = Rollouts(self.database, now_micros)
        self.ingest = Ingest(
            BrokerAddress(
                settings.broker,
                settings.broker_port,
                layout.site.server_ca_file,
                layout.site.ingest_certificate,
                layout.site.ingest_key,
            ),
            Writer(self.database, now_micros),
            now_micros,
            batch=settings.ingest_batch,
            linger_s=settings.ingest_linger_ms / 1000,
        )
        self.revocations = RevocationLists(self.devices.revocations, SiteBroker(layout, settings), now_micros)
        self._tls: ssl.SSLContext | None = None
        self.workers = Workers(self._tasks())

    def serve(self, ready: Callable[[], None]) -> None:
        """Run until SIGTERM or SIGINT; ``ready`` is called when both listeners answer."""
        settings = self.settings
        with contextlib.ExitStack() as stack:
            stack.callback(self.database.close)
            api = stack.enter_context(bind(settings.api_host, settings.api_port, "api_port"))
            device = stack.enter_context(bind(settings.device_host, settings.device_port, "device_port"))
            stack.callback(self.signer.stop)
            self.signer.start()
            stack.callback(self.signer_client.close)
            self.images.prepare()
            self.releases.prepare()
            self.revocations.evict_later(self.devices.revoked())
            self.revocations.tick()
            stack.callback(self.ingest.stop)
            self.ingest.start()
            stack.callback(self.workers.stop)
            self.workers.start()
            serve([Listener(self._api_config(), api), Listener(self._device_config(), device)], ready)
            log.info("control_plane.stopping")

    def operators_app(self) -> FastAPI:
        """Return the operators' API."""
        return operators_app(
            version("pithead"),
            self.access,
            [
                devices.router(self.devices),
                groups.router(self.devices),
                telemetry.router(self.telemetry),
                events.router(self.telemetry),
                tokens.router(self.access, self.enrolment),
                releases.router(self.releases),
                rollouts.router(self.rollouts),
                health.router(version("pithead"), self._parts()),
            ],
            max_body_bytes=self.settings.max_body_bytes,
        )

    def devices_app(self) -> FastAPI:
        """Return the devices' API."""
        return devices_app(
            version("pithead"),
            self.devices,
            [enrol.router(self.enrolment), bundle.router(self.director, self.layout.objects)],
            max_body_bytes=self.settings.max_body_bytes,
        )

    def _api_config(self) -> Config:
        return Config(
            self.operators_app(), log_config=None, access_log=False, server_header=False, lifespan="off"
        )

    def _device_config(self) -> Config:
        site = self.layout.site
        self._tls = server_context(site.server_certificate, site.server_key, site.device_ca_file)
        return device_config(self.devices_app(), self._tls)

    def _tasks(self) -> list[Task]:
        hints = HintPublisher(self.database, self.director.hint, self.ingest)
        worker = RolloutWorker(Progress(self.database))
        return [
            Task("signer", 1.0, self.signer.keep),
            Task("hints", 0.25, hints.tick),
            Task("rollouts", 0.5, lambda: worker.tick(now_micros())),
            Task("image-metadata", 60.0, self.images.renew),
            Task("revocations", 5.0, self.revocations.tick),
            Task("certificates", 3600.0, self.renew_certificates),
            Task("offline-metadata", 24 * 3600.0, self.images.warn),
            Task("staging", 600.0, self.releases.sweep),
            Task("retention", 600.0, Retention(self.database, now_micros).tick),
        ]

    def _parts(self) -> dict[str, Callable[[], bool]]:
        return {
            "database": self._database_answers,
            "broker": lambda: self.ingest.connected,
            "revocations": lambda: self.revocations.in_force,
            "signer": self.signer_client.answers,
        }

    def _database_answers(self) -> bool:
        try:
            with self.database.reading() as tx:
                tx.execute(text("SELECT 1"))
        except SQLAlchemyError:
            return False
        return True

    def renew_certificates(self) -> bool:
        """Renew the site's own certificates, for those who connect from now on; whether it was time."""
        site = self.layout.site
        if not site.renew(self.layout.server_names(self.settings), pki.moment(now_micros())):
            return False
        broker.write_certificate(
            self.layout.broker, site.server_certificate.read_bytes(), site.server_key.read_bytes()
        )
        told = broker.reload(self.layout.broker)
        if self._tls is not None:
            self._tls.load_cert_chain(site.server_certificate, site.server_key)
        self.ingest.renewed()
        log.info("certificates.renewed", extra={"facts": {"broker_told": told}})
        return True

    def _revoked(self, device_id: str) -> bool:
        return self.revocations.revoked(device_id)


class _Anchors:
    """Reads the first roots for ``Enrolment``."""

    def __init__(self, images: ImageRepository, database: Database) -> None:
        self._images = images
        self._database = database

    def first_roots(self) -> tuple[bytes, bytes]:
        """See ``services.enrolment.TrustAnchors``."""
        with self._database.reading() as tx:
            return self._images.read(tx).roots[0], self._images.director_roots(tx)[0]


def require_site(layout: Layout) -> None:
    """Raise ``config.invalid`` naming the command that makes what is missing."""
    if not layout.site.exists:
        raise PitheadError(
            "config.invalid",
            f"{layout.data_dir} is no site; make one: pithead init --data-dir {layout.data_dir}",
        )
    if not any(layout.signer_keys.glob("*.pem")):
        raise PitheadError(
            "config.invalid",
            f"there are no signing keys; make them: pithead keys init --data-dir {layout.data_dir}",
        )
