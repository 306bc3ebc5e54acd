"""The core's commands about users: accounts, sessions, messages. Roster and offline commands are their modules'."""

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from secrets import token_hex
from typing import Any, Final
from xml.sax.saxutils import escape, quoteattr

from lxml import etree

from xmppd.admin.merge import ordered
from xmppd.admin.needs import Accounts, Auth, Router, Server, Sessions
from xmppd.admin.registry import Arg, Call, command
from xmppd.admin.results import List, Rescode, Restuple, Tuple, integer, string
from xmppd.delivery import Pending
from xmppd.errors import CommandError, JidError, StreamError
from xmppd.protocol import jid, ns
from xmppd.protocol.sasl import PasswordError, prep_username
from xmppd.protocol.stanza import KINDS, Stanza
from xmppd.session_manager import SessionInfo

ROUTING: Final = 5.0  # seconds until a command no longer waits for a stanza to be on its way

USER: Final = Arg("user")
HOST: Final = Arg("host")
PASSWORD: Final = Arg("password", secret=True)

_SESSION_FIELDS: Final = (
    string("connection"),
    string("ip"),
    integer("port"),
    integer("priority"),
    string("node"),
    integer("uptime"),
    string("status"),
    string("resource"),
    string("statustext"),
)
_RESOURCE: Final = 7
_PLACE_FIELDS: Final = (*map(string, ("jid", "node", "connection", "ip")), integer("port"), string("since"))


def served_host(server: Server, host: str) -> str | None:
    """The prepared name of a host of ours, None for any other."""
    try:
        name = jid.parse(host).full
    except JidError:
        return None
    return name if name in server.hosts else None


def _jid(user: str, host: str, resource: str = "") -> str:
    return f"{user}@{host}/{resource}" if resource else f"{user}@{host}"


def _row(info: SessionInfo) -> tuple[str | int, ...]:
    """A session's columns; one that sent no presence has priority -1 and is `unavailable`, as in ejabberd."""
    priority = -1 if info.priority is None else info.priority
    show = "unavailable" if info.priority is None else info.show
    return (
        info.connection,
        info.ip,
        info.port,
        priority,
        info.node,
        info.uptime_seconds,
        show,
        info.resource,
        info.status_text,
    )


def _order(info: SessionInfo) -> tuple[str, str, str]:
    return info.host, info.user, info.resource


def _jid_order(full: str) -> tuple[str, str, str]:
    """As `_order`, from what `_jid` made."""
    user, _, rest = full.partition("@")
    host, _, resource = rest.partition("/")
    return host, user, resource


def user_jid(text: str) -> jid.JID:
    """The JID of a user, bare or full, as an operator wrote it. Raises CommandError."""
    try:
        found = jid.parse(text)
    except JidError as exc:
        raise CommandError(f"malformed JID: {exc}") from exc
    if not found.local:
        raise CommandError(f"expected the JID of a user, such as juliet@{found.domain}")
    return found


def _user(values: Mapping[str, Any]) -> str | None:
    """Whose sessions a command is about; None for a name that nobody can have."""
    try:
        return jid.make(values["user"], values["host"]).bare
    except JidError:
        return None


class AccountCommands:
    def __init__(self, server: Server, accounts: Accounts, auth: Auth, sessions: Sessions) -> None:
        self._server, self._accounts, self._auth, self._sessions = server, accounts, auth, sessions

    def _host(self, host: str, prefix: str = "") -> str:
        name = served_host(self._server, host)
        if name is None:
            raise CommandError(f"{prefix}Unknown virtual host")
        return name

    @command(
        "register",
        args=(USER, HOST, PASSWORD),
        result=Restuple(),
        tags=("accounts",),
        scope="shared",
        doc="Create an account",
    )
    async def register(self, user: str, host: str, password: str) -> str:
        name = self._host(host, "cannot_register: ")
        cannot = f"cannot_register: Can't register user {user}@{host} at node {self._server.node}:"
        if not password:
            raise CommandError(f"{cannot} The password contains unacceptable characters")
        try:
            created = await self._auth.register(name, user, password)
        except JidError as exc:
            raise CommandError(f"{cannot} Malformed username") from exc
        except PasswordError as exc:
            raise CommandError(f"{cannot} The password contains unacceptable characters") from exc
        if not created:
            raise CommandError(f"conflict: User {user}@{host} already registered")
        return f"User {user}@{host} successfully registered"

    @command(
        "unregister",
        args=(USER, HOST),
        result=Restuple(),
        tags=("accounts",),
        scope="shared",
        doc="Delete an account with all its data, and end its sessions",
    )
    async def unregister(self, user: str, host: str) -> str:
        name = self._host(host)
        try:
            await self._auth.remove(name, user)
            self._sessions.kick(prep_username(user), name, None, "User removed", condition="conflict")
        except JidError:
            pass  # nobody can have such a name, so it is as gone as one unregistered twice
        return ""

    @command(
        "change_password",
        args=(USER, HOST, Arg("newpass", secret=True)),
        result=Rescode(),
        tags=("accounts",),
        scope="shared",
        doc="Change the password of an account",
    )
    async def change_password(self, user: str, host: str, newpass: str) -> None:
        if not newpass:
            raise CommandError("invalid_password: the password is empty")
        try:
            name = served_host(self._server, host)
            changed = name is not None and await self._auth.set_password(name, user, newpass)
        except JidError:
            changed = False
        except PasswordError as exc:
            raise CommandError("invalid_password: the password contains unacceptable characters") from exc
        if not changed:
            raise CommandError(f"not_found: unknown_user {user}@{host}")

    @command(
        "check_password",
        args=(USER, HOST, PASSWORD),
        result=Rescode(),
        tags=("accounts",),
        reads=True,
        scope="shared",
        doc="Tell by the exit code whether a password is right",
    )
    async def check_password(self, user: str, host: str, password: str) -> bool:
        try:
            name = served_host(self._server, host)
            return name is not None and await self._auth.check_password(name, user, password)
        except (JidError, PasswordError):
            return False

    @command(
        "check_account",
        args=(USER, HOST),
        result=Rescode(),
        tags=("accounts",),
        reads=True,
        scope="shared",
        doc="Tell by the exit code whether an account exists",
    )
    async def check_account(self, user: str, host: str) -> bool:
        try:
            name = served_host(self._server, host)
            return name is not None and await self._accounts.exists(name, prep_username(user))
        except JidError:
            return False

    @command(
        "registered_users",
        args=(HOST,),
        result=List("users", string("username")),
        tags=("accounts",),
        reads=True,
        scope="shared",
        doc="List the accounts of a host",
    )
    async def registered_users(self, host: str) -> list[str]:
        return sorted(await self._accounts.names(self._host(host)))

    @command(
        "registered_vhosts",
        result=List("vhosts", string("vhost")),
        tags=("server",),
        reads=True,
        scope="shared",
        doc="List the hosts this server serves",
    )
    def registered_vhosts(self) -> list[str]:
        return list(self._server.hosts)


class SessionCommands:
    def __init__(self, server: Server, sessions: Sessions) -> None:
        self._server, self._sessions = server, sessions

    def _infos(self, call: Call, user: str = "", host: str = "") -> list[SessionInfo]:
        try:
            of = jid.make(user, host) if user else None
            infos = self._sessions.infos(of.domain, of.local) if of else self._sessions.infos()
        except JidError:
            return []
        node = self._server.node
        return sorted((info for info in infos if not call.local or info.node == node), key=_order)

    @command(
        "connected_users",
        result=List("connected_users", string("sessions")),
        tags=("session",),
        reads=True,
        scope="gather",
        merge=ordered(_jid_order),
        doc="List the full JIDs of all sessions",
    )
    def connected_users(self, call: Call) -> list[str]:
        return [_jid(info.user, info.host, info.resource) for info in self._infos(call)]

    @command(
        "connected_users_info",
        result=List("connected_users_info", Tuple("session", (string("jid"), *_SESSION_FIELDS))),
        tags=("session",),
        reads=True,
        scope="gather",
        merge=ordered(lambda row: _jid_order(row[0])),
        doc="List all sessions with their connection, priority, node, uptime and presence",
    )
    def connected_users_info(self, call: Call) -> list[tuple[str | int, ...]]:
        return [(_jid(info.user, info.host, info.resource), *_row(info)) for info in self._infos(call)]

    @command(
        "connected_users_number",
        result=integer("num_sessions"),
        tags=("session", "statistics"),
        reads=True,
        scope="shared",
        doc="Count all sessions",
    )
    def connected_users_number(self, call: Call) -> int:
        return len(self._infos(call)) if call.local else self._sessions.count()

    @command(
        "user_resources",
        args=(USER, HOST),
        result=List("resources", string("resource")),
        tags=("session",),
        reads=True,
        scope="owner",
        of=_user,
        merge=ordered(str),
        doc="List the resources a user is connected with",
    )
    def user_resources(self, user: str, host: str, call: Call) -> list[str]:
        return [info.resource for info in self._infos(call, user, host)]

    @command(
        "user_sessions_info",
        args=(USER, HOST),
        result=List("sessions_info", Tuple("session", _SESSION_FIELDS)),
        tags=("session",),
        reads=True,
        scope="owner",
        of=_user,
        merge=ordered(lambda row: str(row[_RESOURCE])),
        doc="List the sessions of a user with their connection, priority, node, uptime and presence",
    )
    def user_sessions_info(self, user: str, host: str, call: Call) -> list[tuple[str | int, ...]]:
        return [_row(info) for info in self._infos(call, user, host)]

    @command(
        "where",
        args=(Arg("jid"),),
        result=List("places", Tuple("place", _PLACE_FIELDS)),
        tags=("session",),
        reads=True,
        scope="owner",
        of=lambda values: user_jid(values["jid"]).bare,
        merge=ordered(lambda row: _jid_order(row[0])),
        doc="Tell where the sessions of a user, or the one of a full JID, are: node, connection, address, since when",
    )
    def where(self, jid: str) -> list[tuple[str | int, ...]]:
        of, now = user_jid(jid), time.time()
        infos = (info for info in self._sessions.infos(of.domain, of.local) if of.resource in ("", info.resource))
        return [
            (
                _jid(info.user, info.host, info.resource),
                info.node,
                info.connection,
                info.ip,
                info.port,
                datetime.fromtimestamp(now - info.uptime_seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            )
            for info in sorted(infos, key=_order)
        ]

    @command(
        "kick_user",
        args=(USER, HOST),
        result=integer("num_resources"),
        tags=("session",),
        scope="owner",
        of=_user,
        doc="End all sessions of a user, and tell how many there were",
    )
    def kick_user(self, user: str, host: str) -> int:
        return self._kick(user, host, None, "has been kicked", "policy-violation")

    @command(
        "kick_session",
        args=(USER, HOST, Arg("resource"), Arg("reason")),
        result=Rescode(),
        tags=("session",),
        scope="owner",
        of=_user,
        doc="End one session of a user; the client is told the reason",
    )
    def kick_session(self, user: str, host: str, resource: str, reason: str) -> None:
        self._kick(user, host, resource, reason, "conflict")

    def _kick(self, user: str, host: str, resource: str | None, reason: str, condition: str) -> int:
        try:
            return self._sessions.kick_here(jid.make(user, host, resource or ""), reason, condition)
        except JidError:
            return 0


class StanzaCommands:
    def __init__(self, router: Router) -> None:
        self._router = router

    @command(
        "send_message",
        args=(Arg("type"), Arg("from"), Arg("to"), Arg("subject"), Arg("body")),
        result=Rescode(),
        tags=("stanza",),
        scope="shared",
        doc="Send a message of a type (normal, chat, headline, groupchat) with subject and body to a bare or full JID",
    )
    async def send_message(self, type: str, from_: str, to: str, subject: str, body: str) -> None:
        # any other type counts as normal (RFC 6121 5.2.2), and normal is said by saying nothing
        kind = f" type={quoteattr(type)}" if type in ("chat", "headline", "groupchat") else ""
        title = f"<subject>{escape(subject)}</subject>" if subject else ""
        await self._send(from_, to, f"<message id='{token_hex(8)}'{kind}><body>{escape(body)}</body>{title}</message>")

    @command(
        "send_stanza",
        args=(Arg("from"), Arg("to"), Arg("stanza")),
        result=Rescode(),
        tags=("stanza",),
        scope="shared",
        doc="Send a stanza, given as XML, from one JID to another; they replace the addresses in it",
    )
    async def send_stanza(self, from_: str, to: str, stanza: str) -> None:
        await self._send(from_, to, stanza)

    async def _send(self, sender: str, recipient: str, xml: str) -> None:
        element = _element(xml)
        for name, value in (("from", sender), ("to", recipient)):
            try:
                element.set(name, jid.parse(value).full)
            except JidError as exc:
                raise CommandError(f"malformed JID: {exc}") from exc
        try:
            outcome = self._router.route(Stanza.from_element(element))
        except StreamError as exc:
            raise CommandError(f"invalid xml: {exc.text}") from exc
        if isinstance(outcome, Pending) and not outcome.decided:
            # what is sent next must not overtake it; what became of it is told to its sender, not to the operator
            decided = asyncio.Event()
            outcome.when_decided(decided.set)
            try:
                async with asyncio.timeout(ROUTING):
                    await decided.wait()
            except TimeoutError:
                pass


def _element(xml: str) -> "etree._Element":
    """The one stanza a text holds, in the namespace of clients, without comments and the like."""
    # in a wrapper a DOCTYPE or an XML declaration is not well-formed, and what has no namespace gets the clients'
    wrapped = f'<stream xmlns="{ns.CLIENT}">{xml}</stream>'
    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False)
    try:
        root = etree.fromstring(wrapped.encode(), parser)
    except etree.XMLSyntaxError as exc:
        raise CommandError(f"invalid xml: {(exc.msg or 'syntax error').partition(', line ')[0]}") from exc
    if len(root) != 1 or (root.text or "").strip() or (root[0].tail or "").strip():
        raise CommandError("invalid xml: expected one stanza")
    stanza = root[0]
    if any(not isinstance(node.tag, str) for node in stanza.iter()):
        raise CommandError("invalid xml: comments, entities and processing instructions are not allowed")
    if stanza.tag not in KINDS:
        name = etree.QName(stanza)
        raise CommandError(
            f"incorrect stanza: Unknown tag <{name.localname}/> qualified by namespace '{name.namespace}'"
        )
    stanza.tail = None
    return stanza
