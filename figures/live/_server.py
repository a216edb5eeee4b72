"""Serving the page on this machine alone, and nothing but the page."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from osp_diag.errors import UsageError
from osp_diag.figures.live._page import make_page
from osp_diag.json_text import parse_object
from osp_diag.runs.following import FollowedRun
from osp_diag.terminal import printable

__all__ = ["application", "is_loopback", "serve_page"]

UPDATE = "/_dash-update-component"
PATHS = ("/", "/_dash-layout", "/_dash-dependencies", UPDATE)
MOST_BODY = 2**20
"""Bytes of a request; what the page sends has a few thousand."""
LIBRARIES = "/_dash-component-suites/"
"""Dash's own scripts, which it serves from its packages by a table of theirs."""
POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; connect-src 'self'; font-src 'self'; frame-ancestors 'none'; "
    "base-uri 'none'; form-action 'none'"
)


def serve_page(
    runs: Sequence[FollowedRun], *, host: str = "127.0.0.1", port: int = 8050, every: float = 2.0
) -> int:
    """Serve the page until Ctrl-C; returns the exit code: 1 if a run is bad at the end.

    Raises
    ------
    UsageError : the address cannot be had
    ModuleNotFoundError : Dash is not installed
    """
    from osp_diag.analyses.live import standing

    app = application(runs, host=host, every=every)
    from werkzeug.serving import make_server

    listening = _listen(host, port)
    shown = f"[{host}]" if ":" in host else host
    port = listening.getsockname()[1]
    if not is_loopback(host):
        print(
            f"watch: --host {host} lets other machines see these runs; there is no password. Prefer an ssh "
            f"tunnel: ssh -L {port}:127.0.0.1:{port} THIS_MACHINE",
            file=sys.stderr,
        )
    print(f"watch: http://{shown}:{port}/ (Ctrl-C stops)", flush=True)
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server(host, port, app.server, threaded=True, fd=listening.fileno())
    try:
        server.serve_forever()
    except KeyboardInterrupt:  # how one stops it
        pass
    finally:
        server.server_close()
        listening.close()
    return int(any(standing(run).bad for run in runs))


def application(runs: Sequence[FollowedRun], *, host: str = "127.0.0.1", every: float = 2.0) -> Any:
    """The Dash application behind a guard that lets only the page through."""
    from flask import Flask, Response, request
    from werkzeug.exceptions import HTTPException

    server = Flask("osp_diag_live", static_folder=None)
    server.config["MAX_CONTENT_LENGTH"] = MOST_BODY

    def plain(text: str, status: int) -> Response:
        return Response(f"{text}\n", status, mimetype="text/plain")

    @server.before_request
    def guard() -> Response | None:
        try:
            named_rightly = _named_rightly(request.headers.get("Host", ""), host)
        except ValueError:
            return plain("The Host header is no host.", 400)
        if not named_rightly:
            return plain(
                "This page answers to the name or address of its own machine only (protection against DNS "
                "rebinding). Open it as http://127.0.0.1, or through an ssh tunnel as http://localhost.",
                403,
            )
        if request.path not in PATHS and not request.path.startswith(LIBRARIES):
            return plain("Nothing but the page is served here.", 404)
        if request.method == "POST":
            if (request.content_length or 0) > MOST_BODY:
                return plain(f"At most {MOST_BODY:,} bytes are read.", 413)
            # What the page itself sends fits; of the rest Dash would make a traceback.
            if request.path != UPDATE or not _is_question(request.get_data(), page.callback_map):
                return plain("This is nothing that the page asks.", 400)
        return None

    @server.errorhandler(Exception)
    def failed(error: Exception) -> Response:
        if isinstance(error, HTTPException):
            return plain(error.description or error.name, error.code or 500)
        if request.path.startswith(LIBRARIES):  # a library or file that Dash does not know
            return plain("Nothing but the page is served here.", 404)
        print(
            printable(f"watch: the page could not be made: {type(error).__name__}: {error}"), file=sys.stderr
        )
        return plain("The page could not be made; the terminal says why.", 500)

    @server.after_request
    def strict(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    page = make_page(runs, every=every, server=server)
    return page


def _is_question(body: bytes, callbacks: Mapping[str, Any]) -> bool:
    """Whether a body is one that the page in a browser sends: a callback with its inputs and states."""
    try:
        question = parse_object(body)
    except ValueError:
        return False
    output = question.get("output")
    callback = callbacks.get(output) if isinstance(output, str) else None
    return (
        callback is not None
        and all(_are_properties(question.get(kind, []), callback[kind]) for kind in ("inputs", "state"))
        and _are_outputs(question.get("outputs"), str(output))
        and _are_names(question.get("changedPropIds", []))
    )


def _are_properties(values: Any, declared: Sequence[Mapping[str, str]]) -> bool:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        return False
    names = [(value.get("id"), value.get("property")) for value in values]
    return names == [(entry["id"], entry["property"]) for entry in declared]


def _are_outputs(values: Any, output: str) -> bool:
    parts = values if isinstance(values, list) else [values]
    if not parts or not all(isinstance(part, dict) for part in parts):
        return False
    named = "...".join(f"{part.get('id')}.{part.get('property')}" for part in parts)
    return output in (f"..{named}..", named)


def _are_names(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, str) and "." in value for value in values)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _named_rightly(header: str, host: str) -> bool:
    """Whether a browser asked for us by a name that nobody else can point at us.

    A foreign site can let its own name resolve to 127.0.0.1 and read what is there; it cannot do so for
    an address, for localhost, or for the name that the user gave. ValueError if it is no host at all.
    """
    place = urlsplit(f"//{header}")
    name = place.hostname or ""
    if not header.isprintable() or (place.port is not None and place.path):
        raise ValueError(header)
    if is_loopback(name) or name == host.lower():
        return True
    if is_loopback(host):
        return False
    return _is_address(name) or name == socket.gethostname().lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise UsageError(f"--port {port}: a port is a number from 0 (any that is free) to 65535")
    listening = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(64)
    except OSError as error:
        if listening is not None:
            listening.close()
        advice = "choose another with --port (0 takes any that is free)"
        if isinstance(error, socket.gaierror):
            advice = "give an address of this machine with --host"
        raise UsageError(
            f"cannot serve on {host}, port {port}: {error.strerror or error}; {advice}"
        ) from error
    return listening
