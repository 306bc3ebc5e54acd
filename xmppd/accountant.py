"""Accounts with their passwords and their sessions: what admin commands and modules work on."""

from collections.abc import Callable, Mapping

from xmppd.auth import Auth
from xmppd.events import UserDeleted, UserRegistered
from xmppd.hooks import Hooks
from xmppd.protocol.jid import make
from xmppd.protocol.sasl import Secret
from xmppd.session_manager import SessionManager
from xmppd.storage import Accounts


class Accountant:
    """One for all of a node's hosts."""

    def __init__(self, auth: Auth, accounts: Accounts, sessions: SessionManager, hooks: Hooks) -> None:
        self._auth = auth
        self._accounts = accounts
        self._sessions = sessions
        self._hooks = hooks

    async def exists(self, host: str, username: str) -> bool:
        """Also an anonymous account, for as long as its session lives."""
        return self._sessions.is_anonymous(make(username, host)) or await self._accounts.exists(host, username)

    async def names(self, host: str, *, limit: int, after: str | None) -> list[str]:
        return await self._accounts.names(host, limit=limit, after=after)

    async def register(self, host: str, user: str, password: str) -> bool:
        """Make an account; False when there is one."""
        if not await self._auth.register(host, user, password):
            return False
        await self._tell(UserRegistered(make(user, host)))
        return True

    async def adopt(self, host: str, user: str, secrets: Mapping[str, Secret]) -> bool:
        """Make an account that had its password elsewhere; False when there is one. `user` is that of a JID."""
        if not await self._accounts.adopt(host, user, secrets):
            return False
        await self._tell(UserRegistered(make(user, host)))
        return True

    async def set_password(self, host: str, user: str, password: str) -> bool:
        return await self._auth.set_password(host, user, password)

    async def check_password(self, host: str, user: str, password: str) -> bool:
        return await self._auth.check_password(host, user, password)

    async def remove(self, host: str, user: str, *, removed: Callable[[], None] | None = None) -> bool:
        """Remove an account, end its sessions, let the modules forget it; False when there was none. `removed` is
        called before the sessions end."""
        jid = make(user, host)
        if not await self._auth.remove(host, user):
            return False
        if removed is not None:
            removed()
        self._sessions.kick(jid.local, jid.domain, None, "User removed", condition="conflict")
        await self._tell(UserDeleted(jid))
        return True

    async def _tell(self, event: object) -> None:
        waiting = self._hooks.notify(event)
        if waiting is not None:
            await waiting
