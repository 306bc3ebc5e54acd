"""The session manager: what arrives for a user goes to the right sessions, to those who keep it, or back.

The rules are the tables of requirements 3.4: MAX is every available resource of the highest priority, if that is not
negative; NONNEG all that are not negative; OFF means MessageUndeliverable, where storage for absent users listens.
"""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from xmppd.cluster.tables import Owner, SessionRow, SessionTable
from xmppd.delivery import SAFE, Bounce, Gate, Outcome, Pending, Record, Spawn, first_of
from xmppd.errors import StanzaError
from xmppd.events import (
    MessageUndeliverable,
    PresenceBounced,
    ProbeReceiving,
    RequestReceiving,
    SubscriptionReceiving,
)
from xmppd.hooks import Hooks
from xmppd.iq import IqDispatcher
from xmppd.protocol.jid import JID, bare
from xmppd.protocol.stanza import Stanza

Rows = Mapping[str, SessionRow]
SUBSCRIPTIONS = frozenset({"subscribe", "subscribed", "unsubscribe", "unsubscribed"})


class LiveSession(Protocol):
    """A session of this process, as its manager sees it."""

    jid: JID
    anonymous: bool

    def deliver(self, stanza: Stanza) -> Outcome:
        """Write to its client, behind what was stored for it. Raises StanzaError."""
        ...

    def replaced(self) -> None:
        """Another stream bound the same resource: end with `conflict`."""
        ...

    def kick(self, reason: str, condition: str) -> None:
        """An operator ends it."""
        ...

    def info(self) -> "SessionInfo": ...


class KnownAccounts(Protocol):
    """Which accounts exist."""

    def known(self, host: str, username: str) -> bool:
        """Whether it is remembered to exist; False means: ask."""
        ...

    async def exists(self, host: str, username: str) -> bool: ...


@dataclass(frozen=True, slots=True)
class SessionInfo:
    """One session for an operator's eyes."""

    user: str
    host: str
    resource: str
    connection: str  # c2s, c2s_tls
    ip: str
    port: int
    priority: int | None
    node: str
    uptime_seconds: int
    show: str  # available, chat, away, xa, dnd; "" before presence
    status_text: str


class SessionManager:
    """One per node; the table behind it is the cluster's."""

    def __init__(
        self,
        *,
        table: SessionTable,
        owner: Owner,
        accounts: KnownAccounts,
        hooks: Hooks,
        iqs: IqDispatcher,
        bounce: Bounce,
        spawn: Spawn,
        strict: bool = False,
    ) -> None:
        self._table = table
        table.on_conflict.append(_displace)
        self._owner = owner
        self._accounts = accounts
        self._hooks = hooks
        self._iqs = iqs
        self._bounce = bounce
        self._gate = Gate(hooks, spawn, bounce)
        self.strict = strict  # routing.profile: rfc6121
        self.rerouted = 0  # stanzas whose session turned out to be dead

    # -- sessions

    def open(self, session: LiveSession) -> SessionRow:
        """Enter a session that was just bound; one with the same full JID ends with `conflict` (requirements ST-01)."""
        row = SessionRow(session.jid, self._owner, time.time_ns(), session, anonymous=session.anonymous)
        displaced = self._table.insert(row)
        if displaced is not None:
            _displace(displaced)
        return row

    def close(self, row: SessionRow) -> bool:
        """Take a session's row out; True when it was the user's last one."""
        self._table.remove(row)
        row.session = None
        return not self._table.rows(row.jid.bare)

    def set_priority(self, row: SessionRow, priority: int | None) -> None:
        """The priority of its presence, or None when it is no longer available."""
        self._table.set_priority(row, priority)

    def oldest(self, user: JID, keep: int) -> list[LiveSession]:
        """The user's oldest sessions beyond `keep` (requirements ST-02)."""
        rows = sorted(self._table.rows(user.bare).values(), key=lambda row: row.bound_at)
        return [row.session for row in rows[: max(0, len(rows) - keep)] if row.session is not None]

    def sessions(self, user: JID) -> list[LiveSession]:
        """The live sessions of a bare JID on this node."""
        return [row.session for row in self._table.rows(user.bare).values() if row.session is not None]

    def local(self) -> Iterator[LiveSession]:
        """Every live session of this node."""
        return (row.session for row in self._table.own_sessions() if row.session is not None)

    def is_bound(self, jid: JID) -> bool:
        return jid.resource in self._table.rows(jid.bare)

    def is_available(self, user: JID) -> bool:
        """Whether a resource is there that takes messages (priority not negative)."""
        return bool(_not_negative(self._table.rows(user.bare)))

    def is_anonymous(self, user: JID) -> bool:
        """Whether this account exists for its session alone: nothing is kept for it, here or on any node."""
        return any(row.anonymous for row in self._table.rows(user.bare).values())

    # -- routing

    def route(self, stanza: Stanza) -> Outcome:
        """Deliver a stanza for a user of one of our hosts. Raises StanzaError."""
        to = stanza.to
        assert to is not None
        rows = self._table.rows(to.bare)
        if stanza.kind == "message":
            return self._message(stanza, to, rows)
        if stanza.kind == "iq":
            return self._iq(stanza, to, rows)
        return self._presence(stanza, to, rows)

    def reroute(self, records: Iterable[Record]) -> None:
        """What was written to a session that died goes to another one, or is kept, or (IQ) back to its sender."""
        for record in records:
            if record.outcome.result is not None:
                continue
            self.rerouted += 1
            stanza = record.stanza
            if stanza.copy:
                record.outcome.settle(SAFE)
                continue
            try:
                if stanza.kind == "iq":
                    record.outcome.follow(self._bounce(stanza, StanzaError("service-unavailable")))
                else:
                    record.outcome.follow(self.route(stanza))
            except StanzaError as error:
                record.outcome.follow(self._bounce(stanza, error))

    def multicast(self, stanza: Stanza, users: Iterable[JID]) -> None:
        """Give one presence to every available resource of many users of our hosts; `to` becomes each user's bare JID.

        The table is asked once per user and the bytes are made once; what crosses to another node does so once."""
        for user in users:
            rows = self._table.rows(user.bare)
            if rows:
                addressed = stanza.addressed(user)
                for row in rows.values():
                    if row.priority is not None:
                        with suppress(StanzaError):  # this one may not see it; the others may
                            self._deliver(row, addressed)

    def _deliver(self, row: SessionRow, stanza: Stanza) -> Outcome:
        outcome: Outcome = row.session.deliver(stanza)
        return outcome

    def _deliver_all(self, rows: list[SessionRow], stanza: Stanza) -> Outcome:
        if len(rows) == 1:
            return self._deliver(rows[0], stanza)
        return first_of([self._deliver(row, stanza) for row in rows]) if rows else SAFE

    def _message(self, stanza: Stanza, to: JID, rows: Rows) -> Outcome:
        if to.resource:
            row = rows.get(to.resource)
            if row is not None:
                return self._deliver(row, stanza)
        kind = stanza.type
        if kind == "error":
            return SAFE
        takers = _not_negative(rows)
        if takers:
            return self._message_to_some(stanza, to, takers, kind)
        if rows or self._accounts.known(to.domain, to.local):
            return self._message_to_none(stanza, to, kind)
        return self._gate.wait(stanza, self._message_to_stranger(stanza, to, kind))

    def _message_to_some(self, stanza: Stanza, to: JID, takers: list[SessionRow], kind: str) -> Outcome:
        if kind == "headline":
            return SAFE if to.resource else self._deliver_all(takers, stanza)
        if kind == "groupchat" or (self.strict and kind == "normal" and to.resource):
            raise StanzaError("service-unavailable")
        if len(takers) == 1:
            return self._deliver(takers[0], stanza)
        highest = max(row.priority or 0 for row in takers)
        return self._deliver_all([row for row in takers if row.priority == highest], stanza)

    def _message_to_none(self, stanza: Stanza, to: JID, kind: str) -> Outcome:
        if kind == "headline":
            return SAFE
        if kind == "groupchat" or (self.strict and kind == "normal" and to.resource):
            raise StanzaError("service-unavailable")
        return self._undeliverable(stanza, to)

    async def _message_to_stranger(self, stanza: Stanza, to: JID, kind: str) -> Outcome:
        exists = await self._accounts.exists(to.domain, to.local)
        # Somebody may have logged in meanwhile.
        rows = self._table.rows(to.bare)
        if rows:
            return self._message(stanza, to, rows)
        if exists:
            return self._message_to_none(stanza, to, kind)
        if kind == "headline" and (to.resource or self.strict):
            return SAFE
        raise StanzaError("service-unavailable")

    def _undeliverable(self, stanza: Stanza, to: JID) -> Outcome:
        if self.is_anonymous(to):
            raise StanzaError("service-unavailable")
        pending = Pending(failed=lambda error: self._bounce(stanza, error))

        def nobody(event: MessageUndeliverable) -> Outcome:
            raise StanzaError("service-unavailable")

        return self._gate.ask(MessageUndeliverable(bare(to), stanza, pending), stanza, nobody, handled=pending)

    def _iq(self, stanza: Stanza, to: JID, rows: Rows) -> Outcome:
        request = stanza.type in ("get", "set")
        if to.resource:
            row = rows.get(to.resource)
            if row is not None:
                return self._deliver(row, stanza)
            if request:
                raise StanzaError("service-unavailable")
            return SAFE
        if not request:
            return SAFE
        if rows or self._accounts.known(to.domain, to.local):
            return self._ask_account(stanza, to, anonymous=any(row.anonymous for row in rows.values()))
        return self._gate.wait(stanza, self._iq_for_absent(stanza, to))

    async def _iq_for_absent(self, stanza: Stanza, to: JID) -> Outcome:
        # No account, no handler: else accounts could be told apart from names that are free.
        if not await self._accounts.exists(to.domain, to.local):
            raise StanzaError("service-unavailable")
        return self._ask_account(stanza, to)

    def _ask_account(self, stanza: Stanza, to: JID, *, anonymous: bool = False) -> Outcome:
        own = stanza.from_ is not None and stanza.from_.bare == to.bare
        if own or not self._hooks.wants(RequestReceiving):
            return self._iqs.dispatch("account", stanza, anonymous=anonymous)
        event = RequestReceiving(bare(to), stanza)
        return self._gate.ask(
            event, stanza, lambda decided: self._iqs.dispatch("account", decided.stanza, anonymous=anonymous)
        )

    def _presence(self, stanza: Stanza, to: JID, rows: Rows) -> Outcome:
        if stanza.type in SUBSCRIPTIONS:
            if self.is_anonymous(to):
                return SAFE  # as for an account that does not exist
            return self._gate.ask(SubscriptionReceiving(bare(to), stanza), stanza, lambda event: SAFE)
        if stanza.type == "probe":
            return self._gate.ask(ProbeReceiving(bare(to), stanza), stanza, lambda event: SAFE)
        if stanza.type == "error":
            self._hooks.notify(PresenceBounced(to, stanza))
        if to.resource:
            row = rows.get(to.resource)
            return SAFE if row is None else self._deliver(row, stanza)
        return self._deliver_all([row for row in rows.values() if row.priority is not None], stanza)

    # -- for operators

    def count(self, host: str | None = None) -> int:
        """How many sessions are bound in the cluster."""
        return self._table.count(host)

    def infos(self, host: str | None = None, user: str | None = None) -> list[SessionInfo]:
        """All sessions, of one host or one of its users, sorted by JID."""
        if user is not None and host is not None:
            rows: Iterable[SessionRow] = self._table.rows(f"{user}@{host}").values()
        else:
            rows = (row for row in self._table.all() if host is None or row.jid.domain == host)
        return [row.session.info() for row in sorted(rows, key=lambda row: row.jid.full) if row.session is not None]

    def kick(
        self, user: str, host: str, resource: str | None, reason: str, *, condition: str = "policy-violation"
    ) -> int:
        """End sessions of a user (one resource, or None for all) with a stream error; how many there were."""
        rows = list(self._table.rows(f"{user}@{host}").values())
        chosen = [row for row in rows if resource is None or row.jid.resource == resource]
        for row in chosen:
            if row.session is not None:
                row.session.kick(reason, condition)
        return len(chosen)

    def kick_here(self, jid: JID, reason: str, condition: str) -> int:
        """End the session of a full JID, or all of a bare one, as far as they are on this node; how many there were."""
        rows = list(self._table.rows(jid.bare).values())
        chosen = [row.session for row in rows if row.session is not None and jid.resource in ("", row.jid.resource)]
        for session in chosen:
            session.kick(reason, condition)
        return len(chosen)


def _displace(row: SessionRow) -> None:
    """End a session of this node whose full JID was bound again, here or elsewhere."""
    if row.session is not None:
        row.session.replaced()


def _not_negative(rows: Rows) -> list[SessionRow]:
    return [row for row in rows.values() if row.priority is not None and row.priority >= 0]
