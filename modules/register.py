"""In-band registration (XEP-0077): new accounts, new passwords, removal. Not among the default modules."""

import unicodedata
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Final
from xml.sax.saxutils import escape

from lxml import etree
from lxml.etree import _Element

from xmppd.errors import JidError, StanzaError, StorageError, XmppdError
from xmppd.events import HANDLED, FeaturesOffering, Handled, UnauthenticatedIq
from xmppd.module_api import (
    NO_REPLY,
    AccessRules,
    Context,
    IqRequest,
    Module,
    NoReply,
    OptionalRate,
    Rate,
    as_stanza_error,
    hook,
    iq,
)
from xmppd.protocol import ns
from xmppd.protocol.jid import make
from xmppd.protocol.sasl import PasswordError
from xmppd.protocol.stanza import Stanza, build, error_element, iq_result

_FEATURE: Final = f'<register xmlns="{ns.REGISTER_FEATURE}"/>'.encode()
_FIVE_AN_HOUR: Final = Rate(5, 3600.0)
_FIELDS: Final = "<username/><password/>"
# "pаypal" with a Cyrillic letter is another account than "paypal", and looks the same.
_LOOK_ALIKE: Final = frozenset({"ARMENIAN", "CHEROKEE", "COPTIC", "CYRILLIC", "GREEK", "LATIN"})
_ADDRESSES: Final = 10_000  # remembered; the one that was silent longest is forgotten


@dataclass(frozen=True, slots=True)
class Config:
    access: str = "all"  # access rule: which accounts may be made
    ip_access: str = "all"  # access rule: from which addresses
    require_encryption: bool = True  # no passwords over connections that others can read
    per_address: OptionalRate = _FIVE_AN_HOUR  # attempts to make an account
    instructions: str = "Choose a username and a password"  # shown by clients
    allow_password_change: bool = True
    allow_removal: bool = True  # of one's own account


class Register(Module[Config]):
    xeps = {77: "2.4"}
    features = (ns.REGISTER,)

    def __init__(self, context: Context, config: Config) -> None:
        super().__init__(context, config)
        self._attempts = Attempts(config.per_address, context.clock)

    @classmethod
    def check_options(cls, config: Config, access: AccessRules) -> Iterator[str]:
        for option, rule in (("access", config.access), ("ip_access", config.ip_access)):
            if not access.has_rule(rule):
                yield f"{option}: there is no access rule {rule!r}"

    # -- before authentication

    @hook(FeaturesOffering)
    def offer(self, event: FeaturesOffering) -> None:
        if not event.authenticated and self._is_safe(event.encrypted):
            event.features.append(_FEATURE)

    @hook(UnauthenticatedIq)
    async def stranger(self, event: UnauthenticatedIq) -> Handled | None:
        """Somebody without an account asks how to get one, or for one."""
        payload = event.stanza.payload
        if payload is None or payload.tag != f"{{{ns.REGISTER}}}query":
            return None
        try:
            inner = await self._answer_stranger(event, payload)
            event.reply(_reply(event, "result", inner))
        except Exception as exc:
            # The request is not sent back: there is a password in it.
            event.reply(_reply(event, "error", error_element(as_stanza_error(exc))))
        return HANDLED

    async def _answer_stranger(self, event: UnauthenticatedIq, query: _Element) -> bytes:
        if not self._is_safe(event.encrypted):
            raise StanzaError("not-acceptable", "an account can be made over an encrypted connection only")
        if event.stanza.to is not None and event.stanza.to.full != event.host:
            raise StanzaError("not-allowed", "log in first")
        if event.stanza.type == "get":
            return self._form("")
        if _child(query, "remove") is not None:
            raise StanzaError("unexpected-request", "log in first")
        if not self._attempts.one_more(event.address):
            raise StanzaError("resource-constraint", "too many attempts from your address, try again later")
        username, password = _text(query, "username"), _text(query, "password")
        if not username or not password:
            raise StanzaError("not-acceptable", "username and password are needed")
        if not self._may_register(event, username):
            raise StanzaError("forbidden", "Access denied by service policy")
        if not await _checked(self.accounts.register(event.host, username, password)):
            raise StanzaError("conflict", "this username is taken")
        self.log.info("account registered", host=event.host, username=username, address=event.address)
        return b""

    def _may_register(self, event: UnauthenticatedIq, username: str) -> bool:
        try:
            user = make(username, event.host)
        except JidError as exc:
            raise StanzaError("not-acceptable", "this username cannot be used") from exc
        if len(_alphabets(user.local)) > 1:
            raise StanzaError("not-acceptable", "a username has letters of one alphabet")
        return self.access.allowed(self.config.access, user, event.address) and self.access.allowed(
            self.config.ip_access, None, event.address, event.host
        )

    def _is_safe(self, encrypted: bool) -> bool:
        return encrypted or not self.config.require_encryption

    def _form(self, known: str) -> bytes:
        text = f"<instructions>{escape(self.config.instructions)}</instructions>"
        return f'<query xmlns="{ns.REGISTER}">{known or text + _FIELDS}</query>'.encode()

    # -- of users

    @iq("get", ns.REGISTER, "query", at="both")
    def state(self, request: IqRequest) -> bytes:
        """Who is logged in has an account."""
        username = self._own_name(request)
        return self._form(f"<registered/><username>{escape(username)}</username><password/>")

    @iq("set", ns.REGISTER, "query", at="both")
    async def change(self, request: IqRequest) -> Stanza | NoReply:
        """A new password, or the end of the account."""
        try:
            username = self._own_name(request)
            if _child(request.payload, "remove") is not None:
                return await self._remove(request, username)
            await self._set_password(request, username)
        except Exception as exc:
            return _error(request.stanza, as_stanza_error(exc))  # without the request
        return iq_result(request.stanza)

    def _own_name(self, request: IqRequest) -> str:
        if not request.sender.local or request.sender.domain != request.target.domain:
            raise StanzaError("not-allowed", "accounts are registered with their own server")
        if request.target.local and not request.is_own:
            raise StanzaError("forbidden")
        return request.sender.local

    async def _set_password(self, request: IqRequest, username: str) -> None:
        if not self.config.allow_password_change:
            raise StanzaError("not-allowed", "passwords are not changed here")
        named, password = _text(request.payload, "username"), _text(request.payload, "password")
        if named and named.lower() != username.lower():
            raise StanzaError("not-allowed", "one's own password only")
        if not password:
            raise StanzaError("bad-request", "the new password is missing")
        if not await _checked(self.accounts.set_password(request.target.domain, username, password)):
            raise StanzaError("registration-required")

    async def _remove(self, request: IqRequest, username: str) -> NoReply:
        if not self.config.allow_removal:
            raise StanzaError("not-allowed", "accounts are not removed here")
        if sum(1 for _ in request.payload.iterchildren(etree.Element)) != 1:
            raise StanzaError("bad-request", "<remove/> stands alone")

        def removed() -> None:  # the session that asked ends next
            self.route(iq_result(request.stanza))

        if not await self.accounts.remove(request.target.domain, username, removed=removed):
            raise StanzaError("registration-required")
        self.log.info("account removed by its user", host=request.target.domain, username=username)
        return NO_REPLY


class Attempts:
    """How often each address has tried lately. An IPv6 site has a whole /64 of addresses, which count as one."""

    def __init__(self, rate: Rate | None, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def one_more(self, address: str) -> bool:
        """Count an attempt; False when there were too many."""
        if self._rate is None:
            return True
        now = self._clock()
        key = _network(address)
        times = self._times.setdefault(key, deque(maxlen=self._rate.count))
        self._times.move_to_end(key)
        if len(self._times) > _ADDRESSES:
            self._times.popitem(last=False)
        if len(times) == self._rate.count and now - times[0] < self._rate.period:
            return False
        times.append(now)
        return True


def _alphabets(username: str) -> set[str]:
    """Those of which letters look like another's, and the name has some."""
    return {unicodedata.name(char, "").partition(" ")[0] for char in username if char.isalpha()} & _LOOK_ALIKE


def _network(address: str) -> str:
    try:
        ip = ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(ip, IPv6Address):
        return str(ip.ipv4_mapped or IPv6Address(int(ip) >> 64 << 64))
    return str(ip)


async def _checked(work: Awaitable[bool]) -> bool:
    """What is wrong with the name or the password, in the words of XMPP."""
    try:
        return await work
    except JidError as exc:
        raise StanzaError("not-acceptable", "this username cannot be used") from exc
    except PasswordError as exc:
        raise StanzaError("not-acceptable", str(exc)) from exc
    except (StanzaError, StorageError):
        raise
    except XmppdError as exc:
        raise StanzaError("resource-constraint", "the server is busy, try again later") from exc


def _child(query: _Element, name: str) -> _Element | None:
    return query.find(f"{{{ns.REGISTER}}}{name}")


def _text(query: _Element, name: str) -> str:
    return query.findtext(f"{{{ns.REGISTER}}}{name}") or ""


def _reply(event: UnauthenticatedIq, type: str, inner: bytes) -> Stanza:
    return build("iq", {"type": type, "id": event.stanza.id or None, "from": event.host}, inner)


def _error(request: Stanza, error: StanzaError) -> Stanza:
    attrs = {
        "type": "error",
        "id": request.id,
        "to": request.from_.full if request.from_ else None,
        "from": request.to.full if request.to else None,
    }
    return build("iq", attrs, error_element(error))
