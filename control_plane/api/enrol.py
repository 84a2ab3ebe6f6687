"""The two paths of the devices' listener that need no certificate: the server's CA, and enrolment."""

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from contract import codec
from contract.bundle import CA_PATH, ENROL_PATH, EnrolRequest
from control_plane.services.enrolment import Enrolment


def router(enrolment: Enrolment) -> APIRouter:
    """Return the routes."""
    routes = APIRouter(tags=["enrolment"])

    @routes.get(CA_PATH, summary="The server's CA (PEM), to be checked against the join token")
    def ca() -> Response:
        return Response(enrolment.server_ca(), media_type="application/x-pem-file")

    @routes.post(ENROL_PATH, summary="Exchange a join token and a signing request for an identity")
    async def enrol(request: Request) -> Response:
        wanted = codec.decode(await request.body(), EnrolRequest)
        answer = await run_in_threadpool(enrolment.enrol, wanted)
        return Response(codec.encode(answer), media_type=codec.JSON)

    return routes
