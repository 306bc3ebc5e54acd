"""Block lists in files of other servers (XEP-0227): as XEP-0191 has them, and what means the same in a privacy list."""

from lxml.etree import _Element

from xmppd.errors import JidError
from xmppd.protocol import ns
from xmppd.protocol.jid import JID, parse

BLOCKLIST = f"{{{ns.BLOCKING}}}blocklist"
PRIVACY = f"{{{ns.PRIVACY}}}query"
_ITEM = f"{{{ns.BLOCKING}}}item"
_LIST = f"{{{ns.PRIVACY}}}list"


def blocked_in(element: _Element, problems: list[str]) -> list[JID] | None:
    """The addresses in a <blocklist/>, or those to which the default privacy list denies all; None: it is neither."""
    if element.tag == BLOCKLIST:
        return _addresses([item.get("jid") or "" for item in element.iterchildren(_ITEM)], problems)
    if element.tag != PRIVACY:
        return None
    default = element.find(f"{{{ns.PRIVACY}}}default")
    name = None if default is None else default.get("name")
    texts = []
    for each in element.iterchildren(_LIST):
        items = list(each.iterchildren(f"{{{ns.PRIVACY}}}item"))
        if each.get("name") != name:
            problems.append("a privacy list that is not the default one was left out")
            continue
        kept = [item for item in items if item.get("type") == "jid" and item.get("action") == "deny" and not len(item)]
        texts += [item.get("value") or "" for item in kept]
        if any(item not in kept and item.get("action") == "deny" for item in items):
            problems.append("rules of the default privacy list that are no plain blocks were left out")
    return _addresses(texts, problems)


def _addresses(texts: list[str], problems: list[str]) -> list[JID]:
    found = []
    for text in texts:
        try:
            found.append(parse(text))
        except JidError as exc:
            problems.append(f"blocked address left out: {exc}")
    return found
