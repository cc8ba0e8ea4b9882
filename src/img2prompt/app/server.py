"""The server: the page, the HTTP API, and what every request and answer must have."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import Annotated, TypeVar
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from typing_extensions import TypedDict
from uvicorn.protocols.http.h11_impl import H11Protocol

from img2prompt.app.answers import Answers, FullAnswer, Gallery
from img2prompt.app.batching import Batcher
from img2prompt.app.uploads import (
    MAX_BYTES,
    MAX_IMAGES,
    MAX_PIXELS,
    SECONDS,
    Full,
    Memory,
    Upload,
    read_uploads,
    why_not,
)
from img2prompt.core.storage import room
from img2prompt.predict.predictor import Predictor

CONNECTIONS = 512  # at one time; each holds a buffer and a file of the process
STATIC = {  # the report's style is the page's too
    "": ("app/page.html", "text/html; charset=utf-8"),
    "page.js": ("app/page.js", "text/javascript; charset=utf-8"),
    "page.css": ("app/page.css", "text/css; charset=utf-8"),
    "report.css": ("report/page.css", "text/css; charset=utf-8"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}

Result = TypeVar("Result")


class Failure(TypedDict):
    """Why a request was refused."""

    error: str


class Found(TypedDict):
    """The answers on images, in the order in which they were sent."""

    images: list[FullAnswer]


class Queue(TypedDict):
    """How many images wait for the model, and how many may."""

    waiting: int
    limit: int


class Limits(TypedDict):
    """What a request may hold, and for how long it may be on its way."""

    bytes: int
    images: int
    pixels: int
    seconds: int


class Health(TypedDict):
    """What runs here. bundle: the name of its folder; model: the model's digest."""

    bundle: str
    model: str
    version: str
    queue: Queue
    limits: Limits


class Sample(TypedDict):
    """An image to try. image: its address, relative to the page's."""

    prompt: str
    image: str


def refusals(*statuses: int) -> dict[int | str, dict[str, object]]:
    """For the API's description: what these statuses come with."""
    return {status: {"model": Failure} for status in statuses}


def application(answers: Answers, bundle: str, batches: Batcher[Upload, FullAnswer], memory: Memory) -> FastAPI:
    """The page and the API.

    Args:
        answers: has the gallery.
        bundle: the name that the model goes by.
        batches: answers uploads; it is closed when the application ends.
        memory: counts what they take.
    """

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batches.close)

    app = FastAPI(
        title="img2prompt",
        version=metadata.version("img2prompt"),
        description="The prompts behind images.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=life,
        telemetry={"tracing": False, "metrics": False, "logs": False, "auto_configure": False},
    )

    @app.exception_handler(AnyHTTPException)
    async def refused(_: Request, error: AnyHTTPException) -> Response:
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return JSONResponse({"error": "not as openapi.json has it"}, 422)

    @app.exception_handler(Full)
    async def full(_: Request, error: Full) -> Response:
        seconds = batches.seconds
        return JSONResponse({"error": f"{error}: try again in {seconds} s"}, 503, {"Retry-After": str(seconds)})

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return JSONResponse({"error": "something went wrong here"}, 500)

    @app.post(
        "/predict",
        response_model=Found,
        responses={422: {"model": Found, "description": "None of the images can be read."}}
        | refusals(400, 403, 408, 413, 415, 421, 500, 503),
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "multipart/form-data": {
                        "schema": {
                            "type": "object",
                            "properties": {"image": {"type": "array", "items": {"type": "string", "format": "binary"}}},
                        }
                    },
                    "image/*": {"schema": {"type": "string", "format": "binary"}},
                },
            }
        },
    )
    async def predict(request: Request) -> Response:
        """Say the prompts of images: files of a form, whatever their fields are called, or one image as the body.

        An image that cannot be read has its error in its place. The status is 200 where any of them can be read, and
        422 where none can. 503 comes with Retry-After.
        """
        with memory.share() as take:
            try:
                uploads = await read_uploads(request, take)
                reasons = await asyncio.to_thread(lambda: [why_not(upload.data) for upload in uploads])
                fine = [upload for upload, reason in zip(uploads, reasons, strict=True) if not reason]
                left = iter(await awaited(request, batches.put(fine)))
            except ClientDisconnect:
                return Response()
        found: list[FullAnswer] = [
            {"path": upload.name, "error": reason} if reason else next(left)
            for upload, reason in zip(uploads, reasons, strict=True)
        ]
        return JSONResponse({"images": found}, 422 if all("error" in one for one in found) else 200)

    @app.get("/health", response_model=Health)
    async def health() -> Health:
        """What runs here, and how much waits."""
        return {
            "bundle": bundle,
            "model": answers.identity,
            "version": app.version,
            "queue": {"waiting": batches.waiting, "limit": batches.limit},
            "limits": {"bytes": MAX_BYTES, "images": MAX_IMAGES, "pixels": MAX_PIXELS, "seconds": SECONDS},
        }

    @app.get("/samples", response_model=list[Sample])
    async def samples() -> list[Sample]:
        """Some of the bundle's images to try, with their prompts."""
        gallery = answers.gallery
        return [{"prompt": gallery.texts[row], "image": answers.address(row)} for row in gallery.samples()]

    @app.get("/thumbnails/{row}", response_class=Response, responses=refusals(404, 422))
    def thumbnails(row: Annotated[int, InPath(ge=0)]) -> Response:
        """A small training image, as JPEG."""
        try:
            data = answers.gallery.read(row) if row < len(answers.gallery.texts) else None
        except (OSError, ValueError):  # a run's image may be gone by now
            data = None
        if data is None:
            raise HTTPException(404, "there is no such image")
        return Response(data, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=86400"})

    for address, (path, kind) in STATIC.items():
        app.add_api_route(f"/{address}", static(path, kind), include_in_schema=False)
    return app


def static(path: str, kind: str) -> Callable[[], Awaitable[Response]]:
    """A route that answers with a file of the library, by the room and the file's name."""
    where, _, name = path.partition("/")
    content = (room(where) / name).read_bytes()

    async def answer() -> Response:
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    return answer


async def awaited(request: Request, futures: Sequence[Future[Result]]) -> list[Result]:
    """The results of futures; they are cancelled where nobody waits for them any more.

    Raises:
        ClientDisconnect: whoever sent the request is gone.
    """

    async def left() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    results, gone = asyncio.gather(*map(asyncio.wrap_future, futures)), asyncio.ensure_future(left())
    try:
        await asyncio.wait([results, gone], return_when=asyncio.FIRST_COMPLETED)
        if not results.done():
            raise ClientDisconnect
        return results.result()
    finally:
        results.cancel()
        gone.cancel()
        await asyncio.gather(results, gone, return_exceptions=True)


class Guard:
    """Around the application: refuses what is meant for another host or comes from another site; adds HEADERS.

    Args:
        app: the application.
        hosts: names that a request's Host may have, beside localhost and the address that it came to.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] = ()) -> None:
        self._app, self._hosts = app, {"localhost", *map(str.lower, hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, as ASGI has it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers, app = Headers(scope=scope), self._app
        if _host(headers) not in {*self._hosts, scope["server"][0]}:
            app = JSONResponse({"error": "this server goes by another name: see --allow-host"}, 421)
        elif scope["method"] == "POST" and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            app = JSONResponse({"error": "only this server's own page may ask that"}, 403)
        await app(scope, receive, guarded)


def _host(headers: Headers) -> str | None:
    """The name in the header Host, without the port; None where there is none that makes sense."""
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname
    except ValueError:
        return None


class Impatient(H11Protocol):
    """A connection; it is closed where there are too many, and where no request comes, which uvicorn would wait for."""

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begin."""
        super().connection_made(transport)
        if len(self.connections) > CONNECTIONS:
            transport.abort()
        self.loop.call_later(SECONDS, self._look, None)

    def _look(self, before: object) -> None:
        """Close a connection that is where it was when it was last looked at: between two requests."""
        if self.transport.is_closing():
            return
        if self.cycle is before and (self.cycle is None or self.cycle.response_complete):
            self.transport.abort()
        else:
            self.loop.call_later(SECONDS, self._look, self.cycle)


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; port 0: to a free one.

    Raises:
        OSError: there is no such address here, or it is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        raise OSError(f"{host}:{port}: {error.strerror}: name others with --host and --port") from None
    return bound


def about(bound: socket.socket) -> str:
    """What to tell whoever starts a server on a socket: its address, and what follows from that."""
    address, port = bound.getsockname()[:2]
    named = f"[{address}]" if ":" in address else address
    found = f"http://{named}:{port}/"
    if not ipaddress.ip_address(address).is_loopback:
        found += (
            "\nEveryone who can reach this address can use it and see the training images and prompts that it shows; "
            "there is no password and no encryption. It answers to its addresses and to the names of --allow-host. "
            "docs/serve.md says how to put it behind a reverse proxy."
        )
    return found


def server(app: ASGIApp, hosts: Collection[str] = ()) -> uvicorn.Server:
    """What runs an application behind a Guard with these hosts; told to end, it first answers what it has taken."""
    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # it warns of every form that is none
    config = uvicorn.Config(
        Guard(app, hosts),
        http=Impatient,
        ws="none",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2 * SECONDS,
    )
    return uvicorn.Server(config)


def serve(predictor: Predictor, folder: Path, bound: socket.socket, hosts: Collection[str] = ()) -> None:
    """Serve a trained model until the process is told to end.

    Args:
        predictor: the model.
        folder: the bundle, or the outputs, that it was loaded from.
        bound: what to listen on.
        hosts: as `Guard`.

    Raises:
        OSError, ValueError: the model has no words, or its tables cannot be read.
    """
    answers = Answers(predictor, Gallery.load(folder))
    app = application(answers, folder.resolve().name, Batcher(answers), Memory())
    bound.listen()  # whoever reads the address may ask at once
    print(about(bound), flush=True)
    server(app, hosts).run([bound])
