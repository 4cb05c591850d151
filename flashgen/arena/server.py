"""The web server of a study (starlette, uvicorn): the page, the pictures by opaque name, and two calls, `join` and `vote`."""

from __future__ import annotations

import hmac
import html
import json
import secrets
import socket
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from flashgen.arena.study import Study
from flashgen.arena.votes import NameTakenError, Votes, clean_name, opened
from flashgen.errors import MachineError, UsageError
from flashgen.progress import say

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

PAGE = Path(__file__).parent / "page"
FILES = {"/page.css": "text/css", "/page.js": "text/javascript"}
LOOPBACK = ("127.0.0.1", "localhost")
MAX_BODY_BYTES = 4096
COOKIE = "flashgen-arena"
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware: security headers on every answer, and no answer to a request without the access token.

    The token comes in the URL once (?token=...) and then in a cookie. `token` None admits everyone.
    """

    def __init__(self, app: ASGIApp, token: str | None) -> None:
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse, RedirectResponse

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                added = [(name.encode(), value.encode()) for name, value in HEADERS.items() if name.encode() not in names]
                message["headers"] = [*message["headers"], *added]
            await send(message)

        if scope["type"] != "http" or self.token is None or self._is(Request(scope).cookies.get(COOKIE, "")):
            return await self.app(scope, receive, send_safely)
        refused: Response = PlainTextResponse("This study needs the whole link that you were given, with its token.", 403)
        if scope["path"] == "/" and self._is(parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]):
            refused = RedirectResponse("/", 303)
            refused.set_cookie(COOKIE, self.token, httponly=True, samesite="lax", max_age=90 * 86400)
        await refused(scope, receive, send_safely)

    def _is(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), str(self.token).encode())


def application(study: Study, votes: Votes, token: str | None = None, hosts: tuple[str, ...] = ("*",)) -> Starlette:
    """The ASGI application of a study. `hosts` are the names under which it answers, against DNS rebinding."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.middleware import Middleware
    from starlette.middleware.trustedhost import TrustedHostMiddleware
    from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse
    from starlette.routing import Route

    def index(request: Request) -> Response:
        return HTMLResponse(page_html(study))

    def file(request: Request) -> Response:
        return FileResponse(PAGE / request.url.path[1:], media_type=FILES[request.url.path])

    def picture(request: Request) -> Response:
        path = study.pictures.get(request.path_params["name"])  # the table is the only way to a file
        if path is None:
            return PlainTextResponse("no such picture", 404)
        return FileResponse(path, media_type="image/png", headers={"cache-control": "private, max-age=86400, immutable"})

    def call(function: Callable[[Mapping[str, Any]], dict[str, Any]]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                body = await _body(request)
                return JSONResponse(await run_in_threadpool(function, body))
            except NameTakenError as error:
                return JSONResponse({"error": str(error), "taken": True}, 409)
            except UsageError as error:
                return JSONResponse({"error": str(error)}, 400)
            except OSError as error:
                return JSONResponse({"error": f"the vote could not be written ({error.strerror}); it will be sent again"}, 507)

        return endpoint

    def join(body: Mapping[str, Any]) -> dict[str, Any]:
        rater = votes.join(_text(body, "name"), _secret(body))
        return {**study.page_data(rater.slot), "rater": rater.name, "votes": votes.of(rater.name)}

    def vote(body: Mapping[str, Any]) -> dict[str, Any]:
        name = _text(body, "name")
        if votes.rater(name) is None:
            raise UsageError("this rater is not known; reload the page")
        rater = votes.join(name, _secret(body))
        comparison = next((c for c in study.plan(rater.slot) if c.id == body.get("comparison")), None)
        if comparison is None:
            raise UsageError("this comparison is not one of yours; reload the page")
        seconds = body.get("seconds")
        votes.vote(rater.name, comparison, _text(body, "choice"), float(seconds) if isinstance(seconds, (int, float)) else None)
        return {"recorded": comparison.id}

    routes = [Route("/", index), *(Route(path, file) for path in FILES)]
    routes += [Route("/picture/{name}", picture), Route("/api/join", call(join), methods=["POST"])]
    routes += [Route("/api/vote", call(vote), methods=["POST"])]
    guards = [Middleware(Guard, token=token), Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))]
    return Starlette(routes=routes, middleware=guards)


def page_html(study: Study) -> str:
    """index.html with the study's question."""
    return (PAGE / "index.html").read_text().replace('id="ask"></p>', f'id="ask">{html.escape(study.settings.question)}</p>')


async def _body(request: Request) -> Mapping[str, Any]:
    """JSON object of a request. Raises UsageError for others; the content type keeps forms of other sites out."""
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise UsageError("a request has the content type application/json")
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > MAX_BODY_BYTES:
            raise UsageError(f"a request has at most {MAX_BODY_BYTES} bytes")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = None
    if not isinstance(body, dict):
        raise UsageError("a request is a JSON object")
    return body


def _text(body: Mapping[str, Any], key: str) -> str:
    if not isinstance(value := body.get(key), str):
        raise UsageError(f"`{key}` is missing")
    return clean_name(value)


def _secret(body: Mapping[str, Any]) -> str:
    if not 16 <= len(token := _text(body, "token")) <= 60:
        raise UsageError("a rater's token has 16 to 60 letters")
    return token


def serve(study_folder: Path, host: str = "127.0.0.1", port: int = 8765) -> None:
    """Serve a study until Ctrl-C; prints the link on stderr.

    On any host but loopback the link has a fresh token, without which nothing is answered. `port` 0 takes a free one. Raises MachineError
    for a port in use, a missing extra, or a second server of the same study; UsageError for a host that is not this machine's.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MachineError('serving a study needs the extra arena: pip install "flashgen[arena]"') from error
    study = Study(study_folder)
    token = None if host in LOOPBACK else secrets.token_urlsafe(16)
    with opened(study) as votes, _listening(host, port) as listener:
        address = _address(host)
        address = f"[{address}]" if ":" in address else address
        link = f"http://{address}:{listener.getsockname()[1]}/" + (f"?token={token}" if token else "")
        say(f"serving {study_folder} at {link}\nCtrl-C ends; every vote is on the disk as it is given, and serving again goes on")
        app = application(study, votes, token, LOOPBACK if token is None else ("*",))
        config = uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=2, server_header=False, lifespan="off")
        with suppress(KeyboardInterrupt):  # uvicorn ends its answers and hands the signal on
            uvicorn.Server(config).run(sockets=[listener])
        say(f"{len(votes.rows())} votes of {len(votes.raters())} people in {votes.path}")


def _listening(host: str, port: int) -> socket.socket:
    """A socket bound to `host` and `port`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, OverflowError, UnicodeError) as error:
        raise UsageError(f"--host {host}: {error}; use 127.0.0.1 (this machine) or 0.0.0.0 (its network too)") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        raise MachineError(
            f"{host} port {port} cannot be listened on ({error}); another program may use it, give another --port"
        ) from error
    return listener


def _address(host: str) -> str:
    """The address under which other machines reach a server on all addresses; `host` itself if it is one address."""
    if host not in ("0.0.0.0", "::"):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # sends nothing; the system chooses the address of its network
            return str(probe.getsockname()[0])
        except OSError:
            return "127.0.0.1"
