"""What nodes tell each other about rosters, as JSON. No I/O."""

from typing import Any

from xmppd.protocol.jid import JID, parse

from .items import Item
from .store import Change


def told(user: JID, change: Change) -> dict[str, Any]:
    """A change that was committed."""
    return {
        "user": user.full,
        "jid": change.jid.full,
        "before": _fields(change.before),
        "after": _fields(change.after),
        "versions": [change.old_version, change.version],
    }


def heard(news: dict[str, Any]) -> tuple[JID, Change]:
    """The same, read back."""
    jid = parse(news["jid"])
    before, after = _item(jid, news["before"]), _item(jid, news["after"])
    old_version, version = news["versions"]
    return parse(news["user"]), Change(jid, before, after, old_version, version)


def _fields(item: Item | None) -> list[Any] | None:
    if item is None:
        return None
    return [item.subscription, item.ask, item.name, list(item.groups), item.approved, item.listed]


def _item(jid: JID, fields: list[Any] | None) -> Item | None:
    if fields is None:
        return None
    subscription, ask, name, groups, approved, listed = fields
    return Item(jid, subscription, ask, name, tuple(groups), approved, listed)
