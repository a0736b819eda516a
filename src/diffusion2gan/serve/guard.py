"""Limits of the served pages: who may send requests, and how large they are. An ASGI middleware.

A page on another site can make a browser send requests to this machine: directly from another
origin, or by giving its own name this machine's address (DNS rebinding). Both are refused.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

MAX_BODY_BYTES = 2**16  # a prompt of 2000 characters, each escaped, is 24 000 bytes
BODY_TIMEOUT_S = 30.0

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Message, Receive, Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to `host`."""
    if host == "localhost":
        return True
    address = parse_address(host)
    return address is not None and address.is_loopback


def parse_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """An IP address; None for a name."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class Guard:
    """Passes requests to `app` if their Host, Origin and body are allowed; answers the others.

    Allowed are, as Host: the loopback names and `host`, the address the server listens on; if
    other machines can reach that, also any IP address, which cannot be rebound, and this machine's
    names. As Origin: none, or the same as Host. A body of up to MAX_BODY_BYTES.
    """

    def __init__(self, app: Application, host: str) -> None:
        self._app = app
        self._host = host
        self._names = {"localhost", host.lower()}
        self._is_public = not is_loopback(host)
        if self._is_public:
            self._names |= {socket.gethostname().lower(), socket.getfqdn().lower()}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return

        # Host and Origin
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._check_host(headers.get(b"host", ""))
        if refusal is None:
            refusal = self._check_origin(headers)
        if refusal is not None:
            await answer(scope, send, 403, refusal)
            return
        if scope["type"] == "websocket" or scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return

        # Read the body, up to the limit
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await read_body(receive, headers.get(b"content-length", "0"))
        except TimeoutError:
            await answer(scope, send, 408, f"The request took longer than {BODY_TIMEOUT_S:g} s.")
            return
        if body is None:
            await answer(
                scope,
                send,
                413,
                f"The request is larger than {MAX_BODY_BYTES} bytes, the most this server reads.",
            )
            return

        # Pass it on
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive_again() -> Message:
            return pending.pop() if pending else await receive()

        await self._app(scope, receive_again, send)

    def _check_host(self, header: str) -> str | None:
        """Why a Host header is refused; None if it is allowed."""
        try:
            name = (urlsplit(f"//{header}").hostname or "").lower()
        except ValueError:
            name = ""
        address = parse_address(name)
        if name in self._names or (address is not None and address.is_loopback):
            return None
        if self._is_public and address is not None:
            return None
        return (
            f"This server does not answer to the name {header[:100]!r}, but to localhost and to "
            f"its --host {self._host}."
        )

    def _check_origin(self, headers: dict[bytes, str]) -> str | None:
        """Why a request of a page is refused; None if it is this server's own page."""
        origin = headers.get(b"origin")
        if origin is None or urlsplit_netloc(origin) == headers.get(b"host", "").lower():
            return None
        return f"A page of {origin[:100]!r} may not send requests to this server."


def urlsplit_netloc(origin: str) -> str | None:
    """`host:port` of an origin; None if it has none, as `null`."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


async def read_body(receive: Receive, length: str) -> bytes | None:
    """The body of a request; None if it is larger than MAX_BODY_BYTES, by its header or in fact."""
    if length.isascii() and length.isdigit() and (len(length) > 9 or int(length) > MAX_BODY_BYTES):
        return None
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message["type"] == "http.request" and message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            return None
    return body


async def answer(scope: Message, send: Send, status: int, text: str) -> None:
    """Ends a request with a status and one line of text."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": text[:100]})
        return
    body = text.encode() + b"\n"
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
