"""Service discovery (XEP-0030): what the hosts and the accounts are and can do."""

from dataclasses import dataclass
from typing import Annotated
from xml.sax.saxutils import quoteattr

from pydantic import AfterValidator

from xmppd.errors import JidError, StanzaError
from xmppd.module_api import IqRequest, Module, iq
from xmppd.protocol import ns
from xmppd.protocol.jid import parse


def _address(text: str) -> str:
    try:
        return parse(text).full
    except JidError:
        raise ValueError("expected an address such as conference.example.net") from None


@dataclass(frozen=True, slots=True)
class Item:
    jid: Annotated[str, AfterValidator(_address)]
    name: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    name: str = "xmppd"  # of the hosts, as clients show it
    extra_items: tuple[Item, ...] = ()  # what the hosts list besides: [{jid: irc.example.net, name: IRC}]


class Disco(Module[Config]):
    xeps = {30: "2.5.0"}
    features = (ns.DISCO_INFO, ns.DISCO_ITEMS)
    account_features = (ns.DISCO_INFO, ns.DISCO_ITEMS)

    @iq("get", ns.DISCO_INFO, "query", at="host")
    def host_info(self, request: IqRequest) -> bytes:
        """An instant messaging server and all that the loaded modules declare."""
        _no_node(request)
        return _info("server", "im", self.config.name, self.server.features())

    @iq("get", ns.DISCO_ITEMS, "query", at="host")
    def host_items(self, request: IqRequest) -> bytes:
        """What the operator lists."""
        _no_node(request)
        return _items([(item.jid, item.name) for item in self.config.extra_items])

    @iq("get", ns.DISCO_INFO, "query", at="account")
    async def account_info(self, request: IqRequest) -> bytes:
        """A registered account, for its owner and those who see its presence."""
        await self._must_be_entitled(request)
        _no_node(request)
        return _info("account", "registered", "", self.server.account_features())

    @iq("get", ns.DISCO_ITEMS, "query", at="account")
    async def account_items(self, request: IqRequest) -> bytes:
        """The available resources, for the same."""
        await self._must_be_entitled(request)
        _no_node(request)
        present = [s.jid.full for s in self.sessions.sessions(request.target) if s.priority is not None]
        return _items([(jid, "") for jid in sorted(present)])

    async def _must_be_entitled(self, request: IqRequest) -> None:
        """XEP-0030 8: others must not find out that the account exists."""
        if not await self.sees_presence(request.sender, request.target):
            raise StanzaError("service-unavailable")


def _no_node(request: IqRequest) -> None:
    if request.payload.get("node"):
        raise StanzaError("item-not-found", "there is no such node")


def _info(category: str, type: str, name: str, features: list[str]) -> bytes:
    named = f" name={quoteattr(name)}" if name else ""
    listed = "".join(f"<feature var={quoteattr(feature)}/>" for feature in features)
    identity = f'<identity category="{category}" type="{type}"{named}/>'
    return f'<query xmlns="{ns.DISCO_INFO}">{identity}{listed}</query>'.encode()


def _items(items: list[tuple[str, str]]) -> bytes:
    listed = "".join(f"<item jid={quoteattr(jid)}{f' name={quoteattr(name)}' if name else ''}/>" for jid, name in items)
    return f'<query xmlns="{ns.DISCO_ITEMS}">{listed}</query>'.encode()
