"""Serving the page on this machine alone, and nothing but the page."""

from __future__ import annotations

import ipaddress
import logging
import socket
import sys
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

from osp_diag.errors import UsageError
from osp_diag.figures.live._page import make_page
from osp_diag.runs.following import FollowedRun

__all__ = ["application", "is_loopback", "serve_page"]

PATHS = ("/", "/_dash-layout", "/_dash-dependencies", "/_dash-update-component")
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

    server = Flask("osp_diag_live", static_folder=None)

    @server.before_request
    def guard() -> Response | None:
        if not _named_rightly(request.headers.get("Host", ""), host):
            return Response(
                "This page answers to the name or address of its own machine only (protection against DNS "
                "rebinding). Open it as http://127.0.0.1, or through an ssh tunnel as http://localhost.\n",
                403,
                mimetype="text/plain",
            )
        if request.path not in PATHS and not request.path.startswith(LIBRARIES):
            return Response("Nothing but the page is served here.\n", 404, mimetype="text/plain")
        return None

    @server.after_request
    def strict(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = POLICY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response

    return make_page(runs, every=every, server=server)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    return host == "localhost" or (_is_address(host) and ipaddress.ip_address(host).is_loopback)


def _named_rightly(header: str, host: str) -> bool:
    """Whether a browser asked for us by a name that nobody else can point at us.

    A foreign site can let its own name resolve to 127.0.0.1 and read what is there; it cannot do so for
    an address, for localhost, or for the name that the user gave.
    """
    name = urlsplit(f"//{header}").hostname or ""
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
