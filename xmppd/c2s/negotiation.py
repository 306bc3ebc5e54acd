"""From the first byte to the bound resource: stream features, STARTTLS, bind (RFC 6120 4.3, 5, 7). The login between
them is authentication.py.

What is to come has its place. SASL2 (XEP-0388) is another set of elements in authentication.py, announced by its
`features` and let in by `nonza`; its success opens no new stream, so the features that follow are sent at once. Bind 2
(XEP-0386), which comes inside of it, calls `_open_session` and `Resumption.enable`, and answers in `<success/>` instead
of with an IQ; `_resume` stands beside it: it carries a session that is there already.
"""

import asyncio
import secrets
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol
from xml.sax.saxutils import escape

from xmppd.auth import Auth
from xmppd.c2s.authentication import Authentication
from xmppd.c2s.connection import Connection
from xmppd.c2s.session import Parts, Session
from xmppd.c2s.stream_management import MODULO, failed
from xmppd.delivery import Pending, as_stanza_error
from xmppd.errors import JidError, StanzaError, StreamError
from xmppd.events import FeaturesOffering, Handled, UnauthenticatedIq
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, make, parse
from xmppd.protocol.stanza import Stanza, error_reply, iq_result
from xmppd.protocol.stream import Nonza, StreamOpened
from xmppd.shaper import ShaperLimits

_SASL: Final = f"{{{ns.SASL}}}"
_SM: Final = f"{{{ns.SM}}}"
_STARTTLS: Final = f"{{{ns.TLS}}}starttls"
_BIND: Final = f"{{{ns.BIND}}}bind"
_RESOURCE: Final = f"{{{ns.BIND}}}resource"
# How often a free resource is looked for when the server makes one up; one try is enough but for a broken generator.
_MADE_UP_TRIES: Final = 8


class TlsContexts(Protocol):
    """The certificates of the hosts."""

    def context(self, alpn: bool = False, host: str | None = None) -> ssl.SSLContext: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """What one listener asks of its clients; the hosts' own settings are asked for when needed."""

    hosts: tuple[str, ...]
    starttls: bool
    starttls_required: bool
    resource_conflict: Callable[[str], str]  # host -> acceptnew, closeold, closenew, setresource
    max_sessions: Callable[[JID, str], int | None]  # user, address -> how many sessions at once
    allowed: Callable[[JID, str], bool]  # full JID, address -> whether it may bind here
    shaper: Callable[[JID | None, str], ShaperLimits | None]  # user if known, address -> how fast it may send


class Negotiation:
    """One stream until its resource is bound. Fulfils connection.Negotiator."""

    def __init__(self, connection: Connection, rules: Rules, auth: Auth, tls: TlsContexts | None, parts: Parts) -> None:
        self._connection = connection
        self._rules = rules
        self._login = Authentication(connection, auth)
        self._tls = tls
        self._parts = parts
        self._host = ""

    @property
    def _user(self) -> JID | None:
        """Who has authenticated."""
        return self._login.user

    # -- the stream header

    def opened(self, event: StreamOpened) -> Coroutine[Any, Any, None] | None:
        """A stream header came: answer with ours and the features."""
        connection = self._connection
        host = _host_of(event.to)
        known = host in self._rules.hosts
        connection.send_header(host if known else "", secrets.token_hex(8), event.from_)
        if not known:
            condition = "improper-addressing" if event.to is None else "host-unknown"
            connection.end(StreamError(condition, "this host is not served here"))
            return None
        if event.version is None or not _is_version_1(event.version):
            connection.end(StreamError("unsupported-version", "XMPP 1.0 is spoken here"))
            return None
        if self._user is not None and host != self._user.domain:
            connection.end(StreamError("not-authorized", "authenticated for another host"))
            return None
        self._host = host
        offering = FeaturesOffering(host, self._user is not None, connection.secure, self._features())
        decision = self._parts.hooks.decide(offering)
        if isinstance(decision, Awaitable):
            return self._offer_later(decision)
        self._offer(decision)
        return None

    async def _offer_later(self, decision: Awaitable[FeaturesOffering | Handled]) -> None:
        self._offer(await decision)

    def _offer(self, decision: FeaturesOffering | Handled) -> None:
        features = [] if isinstance(decision, Handled) else decision.features
        self._connection.write(b"<stream:features>" + b"".join(features) + b"</stream:features>")

    def _features(self) -> list[bytes]:
        secure, rules = self._connection.secure, self._rules
        features: list[bytes] = []
        if self._user is not None:
            features.append(b"<bind xmlns='%b'/>" % ns.BIND.encode())
            features.append(b"<session xmlns='%b'><optional/></session>" % ns.SESSION.encode())
            features.append(b"<sm xmlns='%b'/>" % ns.SM.encode())
        else:
            if not secure and rules.starttls and self._tls is not None:
                required = b"<required/>" if rules.starttls_required else b""
                features.append(b"<starttls xmlns='%b'>%b</starttls>" % (ns.TLS.encode(), required))
            if secure or not rules.starttls_required:
                features += self._login.features(self._host)
            else:
                self._login.withdraw()
        return features

    # -- TLS

    def nonza(self, event: Nonza) -> Coroutine[Any, Any, None] | None:
        """STARTTLS, SASL, and the resumption of a stream."""
        element = event.element
        tag = str(element.tag)
        if not self._host:
            self._connection.end(StreamError("not-authorized"))
        elif tag == _STARTTLS:
            self._starttls()
        elif tag.startswith(_SASL):
            return self._login.element(tag[len(_SASL) :], element)
        elif tag == f"{_SM}resume" and self._user is not None:
            return self._resume(element.get("previd") or "", element.get("h") or "")
        elif tag.startswith(_SM):
            self._connection.write(failed("unexpected-request"))
        else:
            self._connection.end(StreamError("not-authorized", "authenticate first"))
        return None

    def _starttls(self) -> None:
        connection = self._connection
        if connection.secure or self._tls is None or not self._rules.starttls or self._user is not None:
            connection.write(f"<failure xmlns='{ns.TLS}'/>".encode())
            connection.end(StreamError("policy-violation", "TLS was not offered"))
            return
        connection.write(f"<proceed xmlns='{ns.TLS}'/>".encode())
        host, self._host = self._host, ""
        self._login.withdraw()
        connection.start_tls(self._tls.context(False, host))

    # -- bind

    def stanza(self, stanza: Stanza) -> Coroutine[Any, Any, None] | None:
        """Before a resource is bound only the bind request, or what a module takes from strangers, is heeded."""
        if self._user is None:
            return self._from_stranger(stanza)
        payload = stanza.payload if stanza.kind == "iq" and stanza.type == "set" else None
        if payload is None or payload.tag != _BIND:
            self._connection.end(StreamError("not-authorized", "bind a resource first"))
            return None
        return self._bind(stanza, payload.findtext(_RESOURCE) or "")

    async def _bind(self, request: Stanza, wanted: str) -> None:
        try:
            session = await self._open_session(wanted)
        except StanzaError as error:
            self._reply(error_reply(request, error))
            return
        if not session.closed:
            jid = escape(session.jid.full)
            self._reply(iq_result(request, f"<bind xmlns='{ns.BIND}'><jid>{jid}</jid></bind>".encode()))

    async def _open_session(self, wanted: str) -> Session:
        """A session with this resource (or one made up for ""), on this connection; StanzaError."""
        assert self._user is not None
        connection = self._connection
        jid = self._choose(self._user, wanted)
        if not self._rules.allowed(jid, connection.peer[0]):
            connection.log.info("login refused by access rule", jid=jid.full, ip=connection.peer[0])
            # RFC 6120 7.6.2.2; only now is everything known that a rule may ask for.
            raise StanzaError("not-allowed", "Denied by access rule")
        limit = self._rules.max_sessions(self._user, connection.peer[0])
        if limit is not None:
            replacing = self._parts.manager.is_bound(jid)
            self._parts.manager.end_oldest(self._user, limit if replacing else limit - 1)
        session = Session(jid, connection, self._parts, connection.log, anonymous=self._login.anonymous)
        connection.carry(session)
        waiting: Awaitable[None] | None = session.bound()
        if waiting is not None:
            await waiting
        if not session.closed:
            tls = connection.ssl_object
            connection.log.info(
                "session bound",
                jid=jid.full,
                tls=tls.version() if tls else None,
                sasl=self._login.mechanism,
                ip=connection.peer[0],
            )
        return session

    # -- instead of a bind: the session of a stream that was lost (XEP-0198 5)

    async def _resume(self, previd: str, h: str) -> None:
        """<resumed/>, or <failed/>, after which a resource may be bound."""
        user, connection, resumption = self._user, self._connection, self._parts.resumption
        assert user is not None
        if not previd or not (h.isascii() and h.isdigit() and len(h) < 11 and int(h) < MODULO):
            connection.write(failed("bad-request"))
            return
        if not self._rules.allowed(user, connection.peer[0]):
            connection.log.info("login refused by access rule", jid=user.full, ip=connection.peer[0])
            connection.write(failed("not-allowed"))
            return
        session, handled = await self._find(previd, user, int(h))
        managed = None if session is None else session.managed
        if session is None or managed is None:
            resumption.failed += 1
            connection.write(failed("item-not-found", handled))
            return
        if not connection.is_open:
            return  # the session waits for the next one
        session.log = connection.log
        undecided = managed.resume(connection)
        connection.log.info(
            "session resumed", jid=session.jid.full, stanzas=len(managed.outbound), ip=connection.peer[0]
        )
        if undecided is not None:
            await _decided(undecided)

    async def _find(self, previd: str, user: JID, h: int) -> tuple[Session | None, int | None]:
        """The session, ready to go on, or perhaps how much had arrived of it. StreamError."""
        resumption = self._parts.resumption
        session = resumption.find(previd, user)
        if session is not None and session.managed is not None:
            if await session.managed.come_back(h):
                resumption.here += 1
                return session, None
        elif resumption.handover is not None:
            found = await resumption.handover.fetch(previd, user, h)
            if isinstance(found, Session):
                resumption.from_elsewhere += 1
                return found, None
            if found is not None:
                return None, found
        return None, resumption.handled(previd, user)

    def _choose(self, user: JID, wanted: str) -> JID:
        """The full JID to bind; StanzaError bad-request or conflict (RFC 6120 7.7.2)."""
        manager = self._parts.manager
        if wanted:
            try:
                jid = make(user.local, user.domain, wanted)
            except JidError as exc:
                raise StanzaError("bad-request", "this resource cannot be used") from exc
            if not manager.is_bound(jid):
                return jid
            policy = self._rules.resource_conflict(user.domain)
            if policy in ("acceptnew", "closeold"):
                return jid
            if policy == "closenew":
                raise StanzaError("conflict", "this resource is in use")
        for _ in range(_MADE_UP_TRIES):
            jid = make(user.local, user.domain, secrets.token_urlsafe(12))
            if not manager.is_bound(jid):
                return jid
        raise StanzaError("resource-constraint", "no free resource found")

    def _from_stranger(self, stanza: Stanza) -> Coroutine[Any, Any, None] | None:
        connection = self._connection
        secure = connection.secure or not self._rules.starttls_required
        if stanza.kind != "iq" or not self._host or not secure or stanza.type not in ("get", "set"):
            connection.end(StreamError("not-authorized", "authenticate first"))
            return None
        event = UnauthenticatedIq(self._host, connection.peer[0], connection.secure, stanza, self._reply)
        return self._ask_modules(event)

    async def _ask_modules(self, event: UnauthenticatedIq) -> None:
        try:
            decision = self._parts.hooks.decide(event)
            if isinstance(decision, Awaitable):
                decision = await decision
        except Exception as exc:
            self._reply(error_reply(event.stanza, as_stanza_error(exc)))
            return
        if not isinstance(decision, Handled):
            self._connection.end(StreamError("not-authorized", "authenticate first"))

    def _reply(self, stanza: Stanza | None) -> None:
        if stanza is not None:
            self._connection.write(stanza.xml)


async def _decided(pending: Pending) -> None:
    decided = asyncio.Event()
    pending.when_decided(decided.set)
    await decided.wait()


def _host_of(to: str | None) -> str:
    """The domain a stream header asks for, prepared; "" when it names none."""
    if not to:
        return ""
    try:
        jid = parse(to)
    except JidError:
        return ""
    return jid.domain


def _is_version_1(version: str) -> bool:
    major, dot, minor = version.partition(".")
    return bool(dot) and major.isdigit() and minor.isdigit() and int(major) >= 1
