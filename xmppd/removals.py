"""Accounts that were removed: every other node forgets what it remembers about them."""

from collections.abc import Awaitable
from typing import Any, Final, Protocol

from xmppd.cluster.interfaces import Calls, Peer
from xmppd.delivery import Spawn
from xmppd.events import UserDeleted, UserForgotten
from xmppd.hooks import Hooks
from xmppd.protocol.jid import parse

_REMOVED: Final = "accounts.removed"


class RememberedAccounts(Protocol):
    """Which accounts are known to exist."""

    def forget(self, host: str, username: str) -> None: ...


class Removals:
    """Tells the others of each UserDeleted, and this node's modules (UserForgotten) of those that others tell."""

    def __init__(self, calls: Calls, accounts: RememberedAccounts, hooks: Hooks, spawn: Spawn) -> None:
        self._calls = calls
        self._accounts = accounts
        self._hooks = hooks
        self._spawn = spawn
        hooks.add("core", UserDeleted, self._deleted)
        calls.on_cast(_REMOVED, self._heard)

    def _deleted(self, event: UserDeleted) -> None:
        self._calls.cast(_REMOVED, event.user.full)

    def _heard(self, peer: Peer, payload: Any) -> None:
        user = parse(payload)
        self._accounts.forget(user.domain, user.local)
        waiting = self._hooks.notify(UserForgotten(user))
        if waiting is not None:
            self._spawn(_finish(waiting), name="an account was removed elsewhere")


async def _finish(waiting: Awaitable[None]) -> None:
    await waiting
