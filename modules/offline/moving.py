"""Offline messages in files of other servers (XEP-0227): <message/> elements, stamped with when they were stored."""

import asyncio
import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

from lxml import etree
from lxml.etree import _Element

from xmppd.errors import JidError, StreamError
from xmppd.module_api import SpoolRow
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import MESSAGE, Stanza

from .rules import expiry

MESSAGES: Final = f"{{{ns.PIE}}}offline-messages"
_DELAY: Final = f"{{{ns.DELAY}}}delay"
_OLD_DELAY: Final = "{jabber:x:delay}x"  # XEP-0091
_LARGEST: Final = 1 << 20  # bytes of one message
_AT_ONCE: Final = 200  # rows
_APART: Final = 0.001  # seconds between two messages, at least: what ids tell apart


@dataclass(frozen=True, slots=True)
class Moved:
    stanza: Stanza
    created_at: float
    expires_at: float | None


class Spool(Protocol):
    async def every(
        self, host: str, username: str, *, after: bytes | None = None, limit: int = 100
    ) -> list[SpoolRow]: ...

    def adopt(
        self, host: str, username: str, sender_bare: str, stanza: bytes, created_at: float, expires_at: float | None
    ) -> Awaitable[object]: ...


async def write_out(spool: Spool, user: JID) -> bytes:
    """All that has not arrived, as one element; b"" when there is nothing."""
    messages = [_xml(element) async for element in _rows(spool, user)]
    if not messages:
        return b""
    return f'<offline-messages xmlns="{ns.PIE}">'.encode() + b"".join(messages) + b"</offline-messages>"


async def take_up(spool: Spool, user: JID, messages: list[Moved]) -> int:
    """Store those that are not there already; how many."""
    there = Counter([_print(element) async for element in _rows(spool, user)] if messages else ())
    new = []
    for each in messages:
        key = _print(each.stanza.editable())
        if there[key]:
            there[key] -= 1
        else:
            new.append(each)
    for start in range(0, len(new), _AT_ONCE):
        await asyncio.gather(
            *[
                spool.adopt(
                    user.domain,
                    user.local,
                    each.stanza.from_.bare if each.stanza.from_ else "",
                    each.stanza.xml,
                    each.created_at,
                    each.expires_at,
                )
                for each in new[start : start + _AT_ONCE]
            ]
        )
    return len(new)


def messages_in(element: _Element, user: JID, now: float, problems: list[str]) -> Iterator[Moved]:
    """The messages in a file's element, in their order; those whose time is over are left out."""
    last = 0.0
    for each in list(element.iterchildren(etree.Element)):
        element.remove(each)  # so that it has no namespaces but those it uses
        try:
            stanza = _message(each, user)
        except (ValueError, JidError, StreamError) as exc:
            problems.append(f"message left out: {exc}")
            continue
        last = max(min(_stored_at(each, user) or now, now), last + _APART)
        expires_at = expiry(stanza, last)
        if expires_at is None or expires_at > now:
            yield Moved(stanza, last, expires_at)


def _message(element: _Element, user: JID) -> Stanza:
    if element.tag != MESSAGE:
        raise ValueError(f"it is a {element.tag[:100]}")
    if not element.get("to"):
        element.set("to", user.bare)
    stanza = Stanza.from_element(element)
    stanza = Stanza.from_bytes(stanza.xml)  # it is read again when it is delivered
    if stanza.type in ("error", "groupchat") or len(stanza.xml) > _LARGEST:
        raise ValueError(f"type {stanza.type}, {len(stanza.xml)} bytes")
    if stanza.to is None or stanza.to.bare != user.bare:
        raise ValueError(f"it is for {stanza.to}")
    return stanza


def _stored_at(message: _Element, user: JID) -> float | None:
    """The stamp of the user's server, else the last one."""
    found = None
    for each in message.iterchildren(_DELAY, _OLD_DELAY):
        when = _time(each.get("stamp") or "")
        if when is not None:
            found = when
            if each.get("from") == user.domain:
                break
    return found


def _time(stamp: str) -> float | None:
    """XEP-0082, or what XEP-0091 had before it (20020910T23:08:25)."""
    try:
        when = datetime.fromisoformat(stamp)
        return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


async def _rows(spool: Spool, user: JID) -> AsyncIterator[_Element]:
    """The messages of a user, each as an element of its own; what cannot be read is nobody's."""
    after: bytes | None = None
    while rows := await spool.every(user.domain, user.local, after=after, limit=_AT_ONCE):
        for row in rows:
            try:
                yield Stanza.from_bytes(row.stanza).editable()
            except (ValueError, JidError):
                continue
        after = rows[-1].id


def _xml(element: _Element) -> bytes:
    etree.cleanup_namespaces(element)
    xml: bytes = etree.tostring(element, encoding="utf-8", with_tail=False)
    return xml


def _print(element: _Element) -> bytes:
    """The same for what means the same, whatever prefixes it is written with."""
    found = hashlib.sha256()
    for event, each in etree.iterwalk(element, events=("start", "end")):
        facts = [each.tag, *sorted(each.attrib.items()), each.text] if event == "start" else [each.tag]
        found.update(repr([event, facts, each.tail if event == "end" and each is not element else None]).encode())
    return found.digest()
