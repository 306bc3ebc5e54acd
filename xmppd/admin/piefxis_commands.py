"""Commands that bring accounts in from other servers, and out to them (XEP-0227)."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from xmppd.admin.registry import Arg, Call, command
from xmppd.admin.results import Restuple
from xmppd.errors import CommandError, JidError, StorageError
from xmppd.piefxis import Exporter, Importer
from xmppd.protocol.jid import make

INCOMPLETE: Final = 33  # docs/exit-codes.md


class PiefxisCommands:
    """`data_dir`: where relative names begin."""

    def __init__(
        self, exporter: Exporter, importer: Importer, data_dir: Path, hosts: Callable[[], Sequence[str]]
    ) -> None:
        self._exporter = exporter
        self._importer = importer
        self._data_dir = data_dir
        self._hosts = hosts

    @command(
        "export_piefxis",
        args=(Arg("dir"),),
        result=Restuple(),
        tags=("database", "migration"),
        scope="node",
        doc="Write all accounts with their rosters, offline messages, private data, vCards and block lists into new"
        " files of a folder of this machine (XEP-0227)",
    )
    async def export_piefxis(self, dir: str, call: Call) -> str:
        return await self._export(dir, self._hosts(), call)

    @command(
        "export_piefxis_host",
        args=(Arg("dir"), Arg("host")),
        result=Restuple(),
        tags=("database", "migration"),
        scope="node",
        doc="The same for the accounts of one host",
    )
    async def export_piefxis_host(self, dir: str, host: str, call: Call) -> str:
        try:
            name = make("", host).domain
        except JidError as exc:
            raise CommandError(str(exc)) from exc
        if name not in self._hosts():
            raise CommandError(f"unknown host: {host}")
        return await self._export(dir, (name,), call)

    async def _export(self, folder: str, hosts: Sequence[str], call: Call) -> str:
        place = self._place(folder)
        if not place.is_dir():
            raise CommandError(f"{place} is no folder")
        try:
            done = await self._exporter.export(place, hosts, call.progress)
        except (OSError, StorageError) as exc:
            raise CommandError(f"the export is not complete: {exc}") from exc
        text = "\n".join([f"{done.file}: {done.accounts} accounts", *done.problems.lines()])
        if done.problems.count:
            raise CommandError(text, INCOMPLETE)
        return text

    @command(
        "import_piefxis",
        args=(Arg("file"),),
        result=Restuple(),
        tags=("database", "migration"),
        scope="node",
        doc="Take up the accounts of a file of this machine, and of those in its folder that it includes (XEP-0227)."
        " Accounts that are there keep their passwords. It may be repeated; code 33 when something was left out",
    )
    async def import_piefxis(self, file: str, call: Call) -> str:
        report = await self._importer.take(self._place(file), call.progress)
        text = "\n".join(report.lines())
        if report.bad and not report.accounts:
            raise CommandError(report.bad)
        if report.bad or report.problems.count:
            raise CommandError(text, INCOMPLETE)
        return text

    def _place(self, name: str) -> Path:
        if not name or "\0" in name:
            raise CommandError("which file?")
        return self._data_dir / name
