"""Takes up the accounts of a file (XEP-0227). Doing it again changes nothing."""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from lxml import etree
from lxml.etree import QName, _Element

from xmppd.errors import JidError, StanzaError, StorageError, XmppdError
from xmppd.events import Handled, UserImporting
from xmppd.hooks import Hooks
from xmppd.piefxis.credentials import TAG, read_credentials
from xmppd.piefxis.reader import BadFile, Fault, User, read_users
from xmppd.piefxis.report import Problems
from xmppd.protocol.jid import JID, make
from xmppd.protocol.sasl import Secret

Progress = Callable[[str], Awaitable[None]]
_AT_ONCE: Final = 64  # accounts under way
_SIGN: Final = 5.0  # seconds between two lines of progress


class Accountant(Protocol):
    """xmppd.accountant.Accountant. Host and user are those of a JID."""

    async def exists(self, host: str, username: str) -> bool: ...
    async def register(self, host: str, user: str, password: str) -> bool: ...
    async def adopt(self, host: str, user: str, secrets: Mapping[str, Secret]) -> bool:
        """Make an account with these keys; False when there is one."""


@dataclass(slots=True)
class Report:
    accounts: int = 0
    created: int = 0
    taken: Counter[str] = field(default_factory=Counter)  # new things, by the name of the element
    unknown: Counter[str] = field(default_factory=Counter)  # elements that no module takes
    problems: Problems = field(default_factory=Problems)
    bad: str = ""  # why the file was not read to its end

    def lines(self) -> list[str]:
        new = "".join(f", {count} {name}" for name, count in sorted(self.taken.items()) if count)
        unknown = [f"left out, no module takes it: {count} {name}" for name, count in sorted(self.unknown.items())]
        ends = [f"not read to its end: {self.bad}"] if self.bad else []
        return [f"accounts: {self.accounts}, {self.created} new{new}", *unknown, *self.problems.lines(), *ends]


class Importer:
    """`hosts` are the ones served here."""

    def __init__(self, accountant: Accountant, hooks: Hooks, hosts: Callable[[], Collection[str]]) -> None:
        self._accountant = accountant
        self._hooks = hooks
        self._hosts = hosts

    async def take(self, file: Path, progress: Progress) -> Report:
        """Goes on behind whatever is wrong with one account, and says so in the report."""
        report = Report()
        running: dict[asyncio.Task[None], None] = {}
        told = time.monotonic()
        try:
            async for each in read_users(file):
                if isinstance(each, Fault):
                    report.problems.add(each.where, each.text)
                    continue
                running[asyncio.create_task(self._user(each, report), name="import an account")] = None
                while len(running) >= _AT_ONCE:
                    await _first_done(running)
                if time.monotonic() - told > _SIGN:
                    told = time.monotonic()
                    await progress(f"{report.accounts} accounts")
        except BadFile as exc:
            report.bad = str(exc)
        finally:
            while running:
                await _first_done(running)
        return report

    async def _user(self, found: User, report: Report) -> None:
        name = found.element.get("name") or ""
        who = f"{name}@{found.host}"[:200]
        report.accounts += 1
        try:
            user = make(name, found.host)
            if not user.local:
                raise JidError("a user has a name")
            if user.domain not in self._hosts():
                report.problems.add(who, "the host is not one of ours")
                return
            if await self._account(user, found.element, report):
                report.created += 1
            for element in list(found.element.iterchildren(etree.Element)):
                if element.tag != TAG:
                    found.element.remove(element)  # so that it has no namespaces but those it uses
                    await self._element(user, element, report)
        except XmppdError as exc:
            report.problems.add(who, str(exc))

    async def _account(self, user: JID, element: _Element, report: Report) -> bool:
        """Whether it is new. One that is there keeps its password."""
        if await self._accountant.exists(user.domain, user.local):
            return False
        secrets = {}
        for each in element.iterchildren(TAG):
            try:
                secret = read_credentials(each)
            except ValueError as exc:
                report.problems.add(user.bare, f"credentials left out: {exc}")
            else:
                secrets[secret.kind] = secret
        password = element.get("password")
        if password:
            return await self._accountant.register(user.domain, user.local, password)
        if not secrets:
            report.problems.add(user.bare, "no password: nobody can log in before one is set (change_password)")
        return await self._accountant.adopt(user.domain, user.local, secrets)

    async def _element(self, user: JID, element: _Element, report: Report) -> None:
        event = UserImporting(user, element)
        label = QName(element).localname[:40]
        try:
            decided = self._hooks.decide(event)
            if isinstance(decided, Awaitable):
                decided = await decided
        except (StanzaError, StorageError) as exc:
            report.problems.add(user.bare, f"{label} left out: {exc}")
            return
        if not isinstance(decided, Handled):
            _count(report.unknown, f"<{label}/> in {QName(element).namespace or 'no namespace'}"[:200])
            return
        _count(report.taken, LABELS.get(element.tag, label), event.count)
        for text in event.problems:
            report.problems.add(user.bare, text)


LABELS: Final = {
    "{jabber:iq:roster}query": "contacts",
    "{jabber:iq:private}query": "private elements",
    "{jabber:client}presence": "subscription requests",
    "{urn:xmpp:pie:0}offline-messages": "offline messages",
    "{vcard-temp}vCard": "vCards",
    "{urn:xmpp:blocking}blocklist": "blocked addresses",
    "{jabber:iq:privacy}query": "blocked addresses",
}


def _count(counter: Counter[str], name: str, by: int = 1) -> None:
    """A hostile file may invent names."""
    counter[name if name in counter or len(counter) < 100 else "others"] += by


async def _first_done(running: dict[asyncio.Task[None], None]) -> None:
    done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        del running[task]
        task.result()
