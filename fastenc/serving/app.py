"""make_app: the routes around a saved model."""

# Annotations are not put off here: FastAPI reads those of functions whose classes are imported within make_app.
import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any

from .. import __version__
from ..data import DataError
from ..data.extras import require
from ..pipeline import SavedModel
from .answers import to_json
from .batching import Batcher, ClosedError, FullError
from .guard import PATHS, Guard, authorized
from .inputs import from_files, from_json
from .metrics import Metrics
from .page import load_page
from .served import ServedModel
from .settings import RefusedError, Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

READ_SECONDS = 60  # that a body may take to come
SMALL = 1 << 14  # bytes of a body that is read where it came: to ask another thread would take longer
SENTENCES = {
    404: f"there is nothing at this address; there is something at {', '.join(PATHS)}",
    405: "this address takes another method: POST for /encode, GET for the others",
}
RETRY = {"Retry-After": "1"}


def make_app(saved: SavedModel, settings: Settings) -> "FastAPI":
    """The application: POST /encode, GET /health, /metrics and the page at /.

    The model is as it was loaded for as long as the application runs, whatever becomes of its folder.

    Raises:
        ModuleNotFoundError: a package of `fastenc[serve]` is missing.
    """
    for module in ("fastapi", "python_multipart"):
        require(module, "serving a model", "serve")
    import anyio
    from fastapi import FastAPI, Query, Request
    from fastapi.exceptions import RequestValidationError
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import HTMLResponse, JSONResponse, Response

    served = ServedModel(saved)
    metrics = Metrics(lambda: batcher.waiting, lambda: batcher.entered)
    batcher = Batcher(
        served.encode,
        batch_rows=settings.batch_rows,
        wait_s=settings.wait_ms / 1000,
        queue=settings.queue,
        observe=metrics.encoded,
    )
    page, policy = load_page()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(batcher.close)

    app = FastAPI(title="fastenc", version=__version__, openapi_url=None, lifespan=lifespan)

    def refuse(refused: RefusedError) -> JSONResponse:
        return JSONResponse({"error": str(refused)}, refused.status, refused.headers)

    app.add_middleware(Guard, settings=settings, metrics=metrics, refuse=refuse)

    async def on_refused(request: Request, error: Any) -> Response:
        return refuse(error)

    async def on_data_error(request: Request, error: Any) -> Response:
        return refuse(RefusedError(422, str(error)))

    async def on_http_error(request: Request, error: Any) -> Response:
        sentence = SENTENCES.get(error.status_code, str(error.detail))
        return JSONResponse({"error": sentence}, error.status_code, error.headers)

    async def on_bad_query(request: Request, error: Any) -> Response:
        first = error.errors()[0]
        return refuse(RefusedError(422, f"{first['loc'][-1]} in the address: {first['msg']}"))

    async def on_other(request: Request, error: Any) -> Response:
        # uvicorn closes the connection after it, so clients should know.
        return refuse(RefusedError(500, "an error within the server; its log says more", {"Connection": "close"}))

    app.add_exception_handler(RefusedError, on_refused)
    app.add_exception_handler(DataError, on_data_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_bad_query)
    app.add_exception_handler(Exception, on_other)

    @app.get("/")
    async def index() -> Response:
        return HTMLResponse(page, headers={"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"})

    @app.get("/health")
    async def health(request: Request) -> Response:
        answer: dict[str, Any] = {"ready": not batcher.closed, "version": __version__}
        answer["token"] = settings.token is not None
        if authorized(dict(request.scope["headers"]), settings):
            answer["model"] = served.describe()
            answer["limits"] = {"rows": settings.max_rows, "bytes": settings.max_bytes}
        return JSONResponse(answer)

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type=metrics.content_type)

    async def read(request: Request) -> bytes | list[tuple[str, bytes]]:
        """A body of JSON, or the files of a form, each as its name and what is in it."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in ("application/json", "multipart/form-data"):
            raise RefusedError(
                415, "send JSON with Content-Type: application/json, or files as a form, as curl -F file=@data.csv does"
            )
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedError(415, "send the body as it is, without Content-Encoding")
        request = limited(request)
        if kind == "application/json":
            return await request.body()
        async with request.form(max_files=settings.max_rows) as form:
            files = [value for _, value in form.multi_items() if not isinstance(value, str)]
            return [(file.filename or "", await file.read()) for file in files]

    def limited(request: Request) -> Request:
        """The same request, whose body breaks off at the limit."""
        too_large = RefusedError(413, f"the body is larger than {settings.max_bytes} bytes; send fewer rows at once")
        stated = request.headers.get("content-length", "0")
        if stated.isdecimal() and int(stated) > settings.max_bytes:
            raise too_large
        size = 0

        async def receive() -> Any:
            nonlocal size
            message = await request.receive()
            size += len(message.get("body", b""))
            if size > settings.max_bytes:
                raise too_large
            return message

        return Request(request.scope, receive)

    async def answer(request: Request, with_map: bool) -> bytes:
        try:
            with anyio.fail_after(READ_SECONDS):
                body = await read(request)
        except TimeoutError:
            raise RefusedError(408, f"the body did not come within {READ_SECONDS} seconds; send it again") from None

        # To another thread where it takes long: the server goes on reading and answering other requests meanwhile.
        async def call(function: Any, *arguments: Any, small: bool) -> Any:
            return function(*arguments) if small else await run_in_threadpool(function, *arguments)

        parse = from_json if isinstance(body, bytes) else from_files
        size = len(body) if isinstance(body, bytes) else sum(len(content) for _, content in body)
        inputs = await call(parse, body, served, settings, small=size <= SMALL and served.reader is None)
        encoded = await asyncio.wrap_future(batcher.submit(inputs, len(inputs)))
        return await call(to_json, inputs, encoded, with_map, small=encoded.vectors.nbytes <= SMALL)

    @app.post("/encode")
    async def encode(request: Request, with_map: Annotated[bool, Query(alias="map")] = False) -> Response:
        try:
            with batcher.enter():
                return Response(await answer(request, with_map), media_type="application/json")
        except FullError:
            raise RefusedError(503, f"{settings.queue} requests are being answered; try again later", RETRY) from None
        except ClosedError:
            raise RefusedError(503, "the server is about to stop; try again later", RETRY) from None
        except ClientDisconnect:
            return Response(status_code=400)  # which nobody reads

    return app
