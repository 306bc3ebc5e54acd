"""Accounts that were removed: every other node forgets what it remembers about them."""

from typing import Any, Final, Protocol

from xmppd.cluster.interfaces import Calls, Peer
from xmppd.events import UserDeleted, UserForgotten
from xmppd.hooks import Hooks, Spawn
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
        self._hooks.notify_aside(UserForgotten(user), self._spawn, name="an account was removed elsewhere")
