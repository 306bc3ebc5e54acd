"""SASL on a client stream (RFC 6120 6): what is offered, the elements of an attempt, who comes out of it.

The exchanges themselves are protocol/sasl.py; here is what they need from the connection (channel bindings, XEP-0440),
from the accounts (secrets, passwords) and from the limits on failed logins. SASL2 (XEP-0388) belongs here as a second
set of elements around the same exchanges; what it asks for along with the login (Bind 2, resumption) is Negotiation's.
"""

import base64
import binascii
from collections.abc import Coroutine
from typing import Any, Final
from xml.sax.saxutils import escape

from lxml.etree import _Element

from xmppd.auth import Auth, AuthBusy
from xmppd.c2s.channel_binding import bindings
from xmppd.c2s.connection import Connection
from xmppd.errors import StorageError, StreamError
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, make
from xmppd.protocol.sasl import (
    PLUS,
    Challenge,
    Exchange,
    NeedsSecret,
    NeedsVerify,
    SaslError,
    Step,
    Success,
    exchange,
)

_ATTEMPTS: Final = 3  # failed or refused SASL attempts on one stream
_WAIT: Final = "the server cannot check credentials now"
_GUESSES: Final = ("not-authorized", "invalid-authzid")  # conditions that say: these were not the right credentials


class _Limited(SaslError):
    """Too many failures already; the attempt was not looked at."""


class Authentication:
    """The login of one stream. `user` is somebody's bare JID as soon as they have proved to be it."""

    def __init__(self, connection: Connection, auth: Auth) -> None:
        self.user: JID | None = None
        self.mechanism = ""
        self.anonymous = False  # the user's account is this login's alone (RFC 4505)
        self._connection = connection
        self._auth = auth
        self._host = ""
        self._offered: list[str] = []
        self._bindings: dict[str, bytes] = {}
        self._exchange: Exchange | None = None
        self._failures = 0

    # -- what is offered

    def features(self, host: str) -> list[bytes]:
        """Offer what there is for a host on this connection as it is now."""
        self._host = host
        self._exchange = None
        self._bindings = bindings(self._connection.ssl_object)
        self._offered = self._auth.mechanisms(host, self._connection.secure, bool(self._bindings))
        features: list[bytes] = []
        if self._offered:
            names = "".join(f"<mechanism>{name}</mechanism>" for name in self._offered)
            features.append(f"<mechanisms xmlns='{ns.SASL}'>{names}</mechanisms>".encode())
        if any(name.endswith(PLUS) for name in self._offered):
            types = "".join(f"<channel-binding type='{name}'/>" for name in self._bindings)
            features.append(f"<sasl-channel-binding xmlns='{ns.SASL_CB}'>{types}</sasl-channel-binding>".encode())
        return features

    def withdraw(self) -> None:
        """Nothing is offered now, and an attempt that goes on is void."""
        self._offered = []
        self._exchange = None

    # -- an attempt

    def element(self, name: str, element: _Element) -> Coroutine[Any, Any, None] | None:
        """An element of SASL's namespace; `name` is its local name."""
        if self.user is not None:
            self._connection.end(StreamError("policy-violation", "already authenticated"))
            return None
        if not self._offered:
            self._fail(SaslError("encryption-required", "negotiate TLS first"))
            return None
        try:
            if name == "auth":
                self._begin(element.get("mechanism") or "")
            elif name == "abort":
                raise SaslError("aborted")
            elif name != "response" or self._exchange is None:
                raise SaslError("malformed-request", "no authentication is going on")
            assert self._exchange is not None
            self._admit(self._exchange)
            return self._follow(self._exchange.receive(_decode(element.text)))
        except SaslError as error:
            self._fail(error)
            return None

    def _begin(self, mechanism: str) -> None:
        self._exchange = None
        self.mechanism = mechanism
        self._exchange = exchange(mechanism, host=self._host, offered=self._offered, bindings=self._bindings)

    def _admit(self, attempt: Exchange) -> None:
        """Asked before each step that could tell something about a password. Other streams of the same guesser go on
        meanwhile, so the answer may change between two steps. Anonymous logins guess nothing."""
        if attempt.mechanism == "ANONYMOUS":
            return
        refusal = self._auth.limits.refusal(self._connection.peer[0], self._host, attempt.username)
        if refusal is not None:
            raise _Limited("temporary-auth-failure", refusal.text)

    def _follow(self, step: Step) -> Coroutine[Any, Any, None] | None:
        if isinstance(step, Challenge):
            self._connection.write(f"<challenge xmlns='{ns.SASL}'>{_encode(step.data)}</challenge>".encode())
        elif isinstance(step, Success):
            self._succeed(step)
        else:
            return self._look_up(step)
        return None

    async def _look_up(self, step: NeedsSecret | NeedsVerify) -> None:
        current = self._exchange
        assert current is not None
        try:
            self._admit(current)
            if isinstance(step, NeedsSecret):
                secret, _ = await self._auth.secret_for(self._host, step.username, step.kind)
                following = current.supply(secret)
            else:
                right = await self._auth.check_password(self._host, step.username, step.password)
                self._admit(current)
                following = current.verified(right)
            more = self._follow(following)
            assert more is None
        except SaslError as error:
            self._fail(error)
        except (StorageError, AuthBusy) as exc:
            # A database that is away must never look like a wrong password.
            self._connection.log.warning("authentication is not possible now", error=exc)
            self._fail(SaslError("temporary-auth-failure", _WAIT))

    # -- its end

    def _succeed(self, step: Success) -> None:
        data = f">{_encode(step.data)}</success>" if step.data else "/>"
        self._connection.write(f"<success xmlns='{ns.SASL}'{data}".encode())
        assert self._exchange is not None
        self.user = make(step.username, self._exchange.host)
        self.anonymous = step.anonymous
        self._exchange = None
        if not step.anonymous:
            self._auth.limits.succeeded(self._connection.peer[0], self._host, step.username)
        self._connection.restart_stream(self._connection.settings.after)

    def _fail(self, error: SaslError) -> None:
        attempt, self._exchange = self._exchange, None
        connection = self._connection
        text = f"<text xml:lang='en'>{escape(error.text)}</text>" if error.text else ""
        connection.write(f"<failure xmlns='{ns.SASL}'><{error.condition}/>{text}</failure>".encode())
        if error.condition in ("aborted", "temporary-auth-failure") and not isinstance(error, _Limited):
            return
        if error.condition in _GUESSES:
            self._auth.limits.failed(connection.peer[0], self._host, attempt.username if attempt else "")
        self._failures += 1
        peer, mechanism = connection.peer[0], self.mechanism[:40]
        if isinstance(error, _Limited):
            connection.log.info("login limited", peer=peer, mechanism=mechanism, text=error.text)
        else:
            connection.log.info(
                "authentication failed", peer=peer, mechanism=mechanism, condition=error.condition, text=error.text
            )
        if self._failures >= _ATTEMPTS:
            connection.end(StreamError("policy-violation", "too many failed attempts"))


def _decode(text: str | None) -> bytes:
    """The data of a SASL element (RFC 6120 6.4.2): base64, "=" for empty data, nothing for no data."""
    stripped = (text or "").strip()
    if stripped in ("", "="):
        return b""
    try:
        return base64.b64decode(stripped, validate=True)
    except (binascii.Error, ValueError) as exc:
        raise SaslError("incorrect-encoding", "not base64") from exc


def _encode(data: bytes) -> str:
    return base64.b64encode(data).decode()
