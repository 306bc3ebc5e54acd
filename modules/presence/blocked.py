"""Whom users block, as far as presence is concerned (XEP-0191)."""

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from xmppd.module_api import BlockingService, Blocklist, Contact
from xmppd.protocol.jid import JID


class _Nobody:
    """The block list of those who block nobody."""

    def blocks(self, other: JID) -> bool:
        return False

    def __bool__(self) -> bool:
        return False


NOBODY: Final = _Nobody()


class Blocks:
    """The block lists, or none where the blocking module is not loaded. `service` raises LookupError then."""

    def __init__(self, service: Callable[[], BlockingService]) -> None:
        self._service = service

    def known(self, user: JID) -> Blocklist | None:
        """Of a user who is here, without waiting; None: not known, so ask `get`."""
        try:
            service = self._service()
        except LookupError:
            return NOBODY
        return service.cached(user)

    async def get(self, user: JID) -> Blocklist:
        """StorageUnavailable."""
        known = self.known(user)
        return await self._service().blocklist(user) if known is None else known

    async def newest(self, user: JID) -> Blocklist:
        """Not an old one that is still in force while another node's change is being loaded. StorageUnavailable."""
        try:
            service = self._service()
        except LookupError:
            return NOBODY
        return await service.blocklist(user)

    def blocks(self, user: JID, other: JID) -> bool:
        """Whether a user who is here blocks somebody; everybody is blocked where it is not known."""
        known = self.known(user)
        return user.bare != other.bare if known is None else known.blocks(other)


def touched(addresses: Iterable[JID], contacts: Mapping[str, Contact], having: Callable[[Contact], bool]) -> list[JID]:
    """The addresses that belong to contacts with a right, and the contacts with it in the domains among them."""
    found: dict[str, JID] = {}
    domains: set[str] = set()
    for address in addresses:
        contact = contacts.get(address.bare)
        if contact is not None and having(contact):
            found[address.full] = address
        if not address.local and not address.resource:
            domains.add(address.full)
    if domains:
        inside = (contact for contact in contacts.values() if contact.jid.domain in domains and having(contact))
        found |= {contact.jid.full: contact.jid for contact in inside}
    return list(found.values())
