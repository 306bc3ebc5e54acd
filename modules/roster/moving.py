"""Rosters in files of other servers (XEP-0227): the items as clients see them, requests as presence stanzas. No I/O."""

from typing import Final

from lxml import etree
from lxml.etree import _Element

from xmppd.errors import JidError, StanzaError
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, bare, parse
from xmppd.protocol.stanza import PRESENCE, Stanza

from .items import Item, Limits, check_texts, known_state

QUERY: Final = f"{{{ns.ROSTER}}}query"
_ITEM: Final = f"{{{ns.ROSTER}}}item"
_GROUP: Final = f"{{{ns.ROSTER}}}group"
_REQUEST: Final = 64 * 1024  # bytes of a request that is kept


def items_in(query: _Element, user: JID, limits: Limits, problems: list[str]) -> list[Item]:
    """The contacts in a file's <query/>, each once."""
    found: dict[str, Item] = {}
    for element in query.iterchildren(_ITEM):
        try:
            item = _item(element, limits)
        except (JidError, StanzaError) as exc:
            problems.append(f"contact left out: {exc}")
            continue
        if item is not None and item.jid.bare != user.bare:
            found[item.jid.full] = item
    return list(found.values())


def _item(element: _Element, limits: Limits) -> Item | None:
    jid = parse(element.get("jid") or "")
    groups = tuple(dict.fromkeys(group.text for group in element.iterchildren(_GROUP) if group.text))
    name = element.get("name") or ""
    check_texts(name, groups, limits)
    subscription = element.get("subscription") or "none"
    if subscription == "remove":
        return None
    subscription, ask = known_state(subscription, "out" if element.get("ask") == "subscribe" else "none")
    return Item(jid, subscription, ask, name, groups)


def merged(item: Item, before: Item | None) -> Item:
    """An item out of a file, in the place of what is there: a request that waits for the user's answer still does."""
    if before is None or not before.asks:
        return item
    ask = "both" if item.ask == "out" else "in"
    subscription, ask = known_state(item.subscription, ask)
    return Item(item.jid, subscription, ask, item.name, item.groups)


def request_in(element: _Element, user: JID) -> tuple[JID, bytes] | None:
    """Who asks, and the stanza that is kept; None: it is no request."""
    if element.tag != PRESENCE or element.get("type") != "subscribe":
        return None
    try:
        stanza = Stanza.from_element(element).replace(to=user.bare)
    except (ValueError, JidError) as exc:
        raise StanzaError("bad-request", str(exc)) from exc
    if stanza.from_ is None or not stanza.from_.local or len(stanza.xml) > _REQUEST:
        raise StanzaError("bad-request", "nobody can be answered")
    contact = bare(stanza.from_)
    return contact, stanza.replace(from_=contact.full).xml


def request_xml(request: Stanza) -> bytes:
    """The kept request as an element with its namespace."""
    element = request.editable()
    etree.cleanup_namespaces(element)
    xml: bytes = etree.tostring(element, encoding="utf-8", with_tail=False)
    return xml
