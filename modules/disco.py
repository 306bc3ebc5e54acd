"""Service discovery (XEP-0030): what the hosts and the accounts are and can do, and whom to write to (XEP-0157)."""

import re
from collections.abc import Awaitable
from dataclasses import dataclass, fields
from typing import Annotated, Final
from xml.sax.saxutils import escape, quoteattr

from pydantic import AfterValidator

from xmppd.errors import JidError, StanzaError
from xmppd.events import DiscoNodeAsking, Handled
from xmppd.module_api import DiscoInfo, DiscoService, IqRequest, Module, iq, several
from xmppd.protocol import ns
from xmppd.protocol.jid import parse

_URI: Final = re.compile(r"[a-z][a-z0-9+.-]*:[^\s<>\"{}|\\^`]+", re.ASCII | re.IGNORECASE)  # RFC 3986 3


def _address(text: str) -> str:
    try:
        return parse(text).full
    except JidError:
        raise ValueError("expected an address such as conference.example.net") from None


def _uri(text: str) -> str:
    if not _URI.fullmatch(text):
        raise ValueError("expected a URI such as mailto:abuse@example.net or xmpp:admin@example.net")
    return text


@dataclass(frozen=True, slots=True)
class Item:
    jid: Annotated[str, AfterValidator(_address)]
    name: str = ""


Uris = Annotated[tuple[Annotated[str, AfterValidator(_uri)], ...], several]


@dataclass(frozen=True, slots=True)
class Addresses:
    """URIs of the people who look after the hosts, by what they look after (XEP-0157)."""

    abuse: Uris = ()
    admin: Uris = ()
    feedback: Uris = ()
    sales: Uris = ()
    security: Uris = ()
    status: Uris = ()
    support: Uris = ()


@dataclass(frozen=True, slots=True)
class Config:
    name: str = "xmppd"  # of the hosts, as clients show it
    extra_items: tuple[Item, ...] = ()  # what the hosts list besides: [{jid: irc.example.net, name: IRC}]
    contact: Addresses = Addresses()  # whom to write to: {abuse: ["mailto:abuse@example.net"], ...}


class Disco(Module[Config]):
    xeps = {30: "2.5.0", 128: "1.0.1", 157: "1.1.1"}
    features = (ns.DISCO_INFO, ns.DISCO_ITEMS)
    account_features = (ns.DISCO_INFO, ns.DISCO_ITEMS)
    provides = (DiscoService,)

    # -- DiscoService

    def host_info(self) -> DiscoInfo:
        """An instant messaging server and all that the loaded modules declare."""
        identities = (("server", "im", self.config.name),)
        return DiscoInfo(identities, tuple(self.server.features()), _contact_form(self.config.contact))

    def info_xml(self, info: DiscoInfo, node: str = "") -> bytes:
        return _info(info, node)

    # -- what is asked

    @iq("get", ns.DISCO_INFO, "query", at="host")
    def host_asked(self, request: IqRequest) -> bytes | Awaitable[bytes]:
        return self._node(request, "info") if _has_node(request) else _info(self.host_info())

    @iq("get", ns.DISCO_ITEMS, "query", at="host")
    def host_items(self, request: IqRequest) -> bytes | Awaitable[bytes]:
        """What the operator lists."""
        if _has_node(request):
            return self._node(request, "items")
        return _items([(item.jid, item.name) for item in self.config.extra_items])

    @iq("get", ns.DISCO_INFO, "query", at="account")
    async def account_info(self, request: IqRequest) -> bytes:
        """A registered account, for its owner and those who see its presence."""
        await self._must_be_entitled(request)
        if _has_node(request):
            return await self._node(request, "info")
        return _info(DiscoInfo((("account", "registered", ""),), tuple(self.server.account_features())))

    @iq("get", ns.DISCO_ITEMS, "query", at="account")
    async def account_items(self, request: IqRequest) -> bytes:
        """The available resources, for the same."""
        await self._must_be_entitled(request)
        if _has_node(request):
            return await self._node(request, "items")
        present = [each.jid.full for each in self.sessions.resources(request.target) if each.priority is not None]
        return _items([(jid, "") for jid in sorted(present)])

    async def _node(self, request: IqRequest, kind: str) -> bytes:
        """Other modules have nodes."""
        asking = DiscoNodeAsking(request.sender, request.target, kind, request.payload.get("node") or "")
        if not isinstance(await self.ask(asking), Handled):
            raise StanzaError("item-not-found", "there is no such node")
        return asking.answer

    async def _must_be_entitled(self, request: IqRequest) -> None:
        """XEP-0030 8: others must not find out that the account exists."""
        if not await self.sees_presence(request.sender, request.target):
            raise StanzaError("service-unavailable")


def _has_node(request: IqRequest) -> bool:
    return bool(request.payload.get("node"))


def _contact_form(contact: Addresses) -> tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...]:
    listed = tuple(
        (f"{field.name}-addresses", getattr(contact, field.name))
        for field in fields(contact)
        if getattr(contact, field.name)
    )
    return ((ns.SERVER_INFO, listed),) if listed else ()


def _info(info: DiscoInfo, node: str = "") -> bytes:
    """The payload of an answer to disco#info."""
    at = f" node={quoteattr(node)}" if node else ""
    identities = "".join(
        f"<identity category={quoteattr(category)} type={quoteattr(type)}{f' name={quoteattr(name)}' if name else ''}/>"
        for category, type, name in info.identities
    )
    features = "".join(f"<feature var={quoteattr(feature)}/>" for feature in info.features)
    forms = "".join(_form(form_type, listed) for form_type, listed in info.forms)
    return f'<query xmlns="{ns.DISCO_INFO}"{at}>{identities}{features}{forms}</query>'.encode()


def _form(form_type: str, listed: tuple[tuple[str, tuple[str, ...]], ...]) -> str:
    kind = f'<field var="FORM_TYPE" type="hidden"><value>{escape(form_type)}</value></field>'
    others = "".join(
        f"<field var={quoteattr(name)} type="
        f'"list-multi">{"".join(f"<value>{escape(value)}</value>" for value in values)}</field>'
        for name, values in listed
    )
    return f'<x xmlns="{ns.DATA_FORMS}" type="result">{kind}{others}</x>'


def _items(items: list[tuple[str, str]]) -> bytes:
    listed = "".join(f"<item jid={quoteattr(jid)}{f' name={quoteattr(name)}' if name else ''}/>" for jid, name in items)
    return f'<query xmlns="{ns.DISCO_ITEMS}">{listed}</query>'.encode()
