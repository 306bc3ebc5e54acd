"""Roster items: what a client may set, and how they look on the wire (RFC 6121 2.1). No I/O."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape

from lxml.etree import _Element

from xmppd.errors import JidError, StanzaError
from xmppd.module_api import Contact
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, parse
from xmppd.protocol.stanza import attributes

from .moves import IN, NOTHING, State

_ITEM: Final = f"{{{ns.ROSTER}}}item"
_GROUP: Final = f"{{{ns.ROSTER}}}group"
# What XML 1.0 cannot carry (2.2): it would end the stream of whoever is sent it.
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of one roster; lengths in bytes of UTF-8."""

    items: int
    requests: int
    groups: int
    text: int


@dataclass(frozen=True, slots=True)
class Item(Contact):
    """A contact. `listed` is False while there is nothing but a request of theirs that waits for an answer: the client
    is not told of such an item (RFC 6121 A.1)."""

    listed: bool = True

    @property
    def state(self) -> State:
        return self.subscription, self.ask

    @property
    def asks(self) -> bool:
        """Whether the contact's request waits for the user's answer."""
        return self.ask in ("in", "both")


@dataclass(frozen=True, slots=True)
class Edit:
    """What a roster set asks for."""

    jid: JID
    remove: bool
    name: str
    groups: tuple[str, ...]


def state_of(item: Item | None) -> State:
    """The state of a contact, who may not be in the roster."""
    return NOTHING if item is None else item.state


def known_state(subscription: str, ask: str) -> State:
    """A pair out of the database as one of the nine that can occur: a request that is granted waits no longer."""
    if (subscription, ask) in IN:
        return subscription, ask
    if subscription not in ("none", "to", "from", "both"):
        return NOTHING
    wants = "out" if ask in ("out", "both") and subscription in ("none", "from") else ""
    asked = "in" if ask in ("in", "both") and subscription in ("none", "to") else ""
    return subscription, "both" if wants and asked else wants or asked or "none"


def read_edit(query: _Element, limits: Limits) -> Edit:
    """The one item of a roster set; StanzaError as RFC 6121 2.3.3 has them."""
    items = query.findall(_ITEM)
    if len(items) != 1:
        raise StanzaError("bad-request", f"a roster set has exactly one item, this one has {len(items)}")
    item = items[0]
    text = item.get("jid")
    if not text:
        raise StanzaError("bad-request", "a roster item has a jid")
    try:
        jid = parse(text)
    except JidError as exc:
        raise StanzaError("jid-malformed", str(exc)) from exc
    if item.get("subscription") == "remove":
        return Edit(jid, True, "", ())
    groups = tuple(group.text or "" for group in item.iterfind(_GROUP))
    if len(set(groups)) != len(groups):
        raise StanzaError("bad-request", "a group is named twice")
    name = item.get("name") or ""
    check_texts(name, groups, limits)
    return Edit(jid, False, name, groups)


def check_texts(name: str, groups: tuple[str, ...], limits: Limits) -> None:
    """Raises StanzaError not-acceptable."""
    if len(groups) > limits.groups:
        raise StanzaError("not-acceptable", f"more than {limits.groups} groups")
    for what, text in (("name", name), *(("group", group) for group in groups)):
        if what == "group" and not text:
            raise StanzaError("not-acceptable", "a group has no name")
        if len(text.encode()) > limits.text:
            raise StanzaError("not-acceptable", f"a {what} is longer than {limits.text} bytes")
        if _NOT_XML.search(text):
            raise StanzaError("not-acceptable", f"a {what} has a character that XML cannot carry")


def item_xml(item: Item) -> str:
    """One <item/> (RFC 6121 2.1.2)."""
    values = {
        "jid": item.jid.full,
        "name": item.name or None,
        "subscription": item.subscription,
        "ask": "subscribe" if item.ask in ("out", "both") else None,
    }
    groups = "".join([f"<group>{escape(group)}</group>" for group in item.groups])
    return f"<item{attributes(values)}>{groups}</item>" if groups else f"<item{attributes(values)}/>"


def removed_xml(jid: JID) -> str:
    """The <item/> that tells of a removal (RFC 6121 2.5)."""
    return f"<item{attributes({'jid': jid.full, 'subscription': 'remove'})}/>"


def query_xml(items: Iterable[str], version: str | None) -> bytes:
    """The <query/> around them."""
    head = attributes({"xmlns": ns.ROSTER, "ver": version})
    return f"<query{head}>{''.join(items)}</query>".encode()
