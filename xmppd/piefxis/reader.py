"""Reads the users of a XEP-0227 file one by one, whatever its size.

The file may be a stranger's: it declares no document type and no entities, it includes files of its own folder alone,
and nothing in it may be endless.
"""

import asyncio
import os
import re
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast
from urllib.parse import unquote, urlsplit

from lxml import etree
from lxml.etree import _Element

from xmppd.errors import XmppdError
from xmppd.protocol import ns
from xmppd.protocol.libxml import NameTable, give_up, read

_DATA: Final = f"{{{ns.PIE}}}server-data"
_HOST: Final = f"{{{ns.PIE}}}host"
_USER: Final = f"{{{ns.PIE}}}user"
INCLUDE: Final = f"{{{ns.XINCLUDE}}}include"
_LEVELS: Final = {_DATA: 0, _HOST: 1, _USER: 2}
_ROOTS: Final = "<server-data/>, <host/> or <user/>"
_LARGEST_PART: Final = 16 << 20  # bytes of a file that a user includes
_PROLOG: Final = rb"(?:\xef\xbb\xbf)?(?:\s+|<\?(?:(?!\?>).)*\?>|<!--(?:(?!-->).)*-->)*+"
_DOCTYPE: Final = re.compile(_PROLOG + rb"<!(?!--)", re.DOTALL)
_ROOT: Final = re.compile(_PROLOG + rb"<[^!?\s]", re.DOTALL)
_CHUNK: Final = 256 * 1024  # bytes read at once
_FIRST: Final = 16 * 1024  # of a file: before that much is read, its root must have begun
MOST: Final = 256 << 20  # bytes of one user, or of anything else between two users
_DEPTH: Final = 8  # files that include each other


class BadFile(XmppdError):
    """The file, or one it includes, is no good from here on; what was read before it is."""


@dataclass(frozen=True, slots=True)
class User:
    """An account as it stands in a file; `element` is nobody else's."""

    host: str  # as it is written there
    element: _Element


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that cannot be read; reading goes on behind it."""

    where: str
    text: str


async def read_users(file: Path) -> AsyncIterator[User | Fault]:
    """Raises BadFile where the file itself is none of these; what was read before it is a fault is given first."""
    async for each in _Reader(file.parent.resolve(), file, ()).users(""):
        yield each


class _Reader:
    """One file. `above`: the files that include it."""

    def __init__(self, folder: Path, file: Path, above: tuple[Path, ...]) -> None:
        self._folder = folder
        self._file = file
        self._above = (*above, file.resolve())
        self._root: _Element | None = None
        self._level = 0  # of the root: 0 <server-data/>, 1 <host/>, 2 <user/>
        self._depth = 0
        self._host = ""
        self._quiet = 0  # bytes since something was done with
        self._names = NameTable()
        self._parser = etree.XMLPullParser(
            events=("start", "end"),
            encoding="utf-8",
            resolve_entities=False,
            no_network=True,
            load_dtd=False,
            huge_tree=False,
            collect_ids=False,
            remove_comments=True,
            remove_pis=True,
        )

    async def users(self, host: str) -> AsyncIterator[User | Fault]:
        """`host`: whose users it has, where it does not say so itself. What may be read may be included: Prosody has a
        whole file for each user."""
        self._host = host
        descriptor = _open(self._file)
        try:
            size = _FIRST
            _check_prolog(await asyncio.to_thread(os.pread, descriptor, _FIRST, 0), self._file)
            bad: BadFile | None = None
            while bad is None and (chunk := await asyncio.to_thread(os.read, descriptor, size)):
                size = _CHUNK
                bad = self._feed(chunk)
                async for each in self._found():
                    yield each
            bad = bad or self._feed(None)
            if bad is not None:
                raise bad
        finally:
            os.close(descriptor)
            give_up(self._parser, self._root, self._names)

    def _feed(self, chunk: bytes | None) -> BadFile | None:
        """None: the end. What is wrong with it comes back: what stands before that is good."""
        try:
            with self._names:
                if chunk is None:
                    self._parser.close()
                else:
                    self._parser.feed(chunk)
        except etree.XMLSyntaxError as exc:
            return BadFile(f"{self._file}: not well-formed: {exc.msg}")
        self._quiet += len(chunk or b"")
        return BadFile(f"{self._file}: an account has more than {MOST >> 20} MiB") if self._quiet > MOST else None

    async def _found(self) -> AsyncIterator[User | Fault]:
        for event, found in self._parser.read_events():
            element = cast(_Element, found)
            if event == "start":
                self._depth += 1
                if self._depth == 1:
                    self._begin(element)
                if self._level + self._depth == 2 and element.tag == _HOST:
                    self._host = element.get("jid") or self._host
                continue
            level = self._level + self._depth - 1
            self._depth -= 1
            if level not in (1, 2):
                continue
            self._quiet = 0
            async for each in self._ended(element, level):
                yield each
            _detach(element)

    def _begin(self, root: _Element) -> None:
        self._root = root
        level = _LEVELS.get(root.tag)
        if level is None:
            raise BadFile(f"{self._file}: its root is {root.tag[:100]!r}, expected {_ROOTS} in {ns.PIE}")
        self._level = level

    async def _ended(self, element: _Element, level: int) -> AsyncIterator[User | Fault]:
        if element.tag == INCLUDE:
            try:
                file = self._included(element)
                async for each in _Reader(self._folder, file, self._above).users(self._host):
                    yield each
            except BadFile as exc:
                yield Fault(str(self._file), str(exc))
        elif element.tag == _USER and level == 2:
            for fault in self._complete(element):
                yield fault
            _detach(element)
            yield User(self._host, element)
        elif not (element.tag == _HOST and level == 1):
            yield Fault(str(self._file), f"nothing is known of {element.tag[:100]}")

    def _complete(self, user: _Element) -> list[Fault]:
        """Put in what the children of a user include. Below them an include is the user's own matter."""
        faults = []
        for child in user.findall(INCLUDE):
            try:
                found = _whole(self._included(child))
            except BadFile as exc:
                faults.append(Fault(str(self._file), str(exc)))
                user.remove(child)
            else:
                user.replace(child, found)
        return faults

    def _included(self, include: _Element) -> Path:
        """The file meant: one in the folder of the first, by a relative address (XEP-0227 4)."""
        href = include.get("href") or ""
        parts = urlsplit(href)
        if include.get("parse", "xml") != "xml" or include.get("xpointer") is not None:
            raise BadFile(f"include of {href[:200]!r}: only whole XML files are included")
        if parts.scheme or parts.netloc or parts.query or parts.fragment or not parts.path:
            raise BadFile(f"include of {href[:200]!r}: expected the name of a file")
        try:
            file = (self._file.parent / unquote(parts.path, errors="strict")).resolve()
        except (OSError, ValueError, RuntimeError) as exc:
            raise BadFile(f"include of {href[:200]!r}: {exc}") from exc
        if not file.is_relative_to(self._folder):
            raise BadFile(f"include of {href[:200]!r}: it is outside of {self._folder}")
        if file in self._above or len(self._above) >= _DEPTH:
            raise BadFile(f"include of {href[:200]!r}: files include each other")
        return file


def _detach(element: _Element) -> None:
    """Nothing piles up; and what the element uses of the namespaces around it is declared in itself, and no more."""
    parent = element.getparent()
    if parent is not None:
        parent.remove(element)


def _whole(file: Path) -> _Element:
    """The root of a small file."""
    descriptor = _open(file)
    try:
        data = os.read(descriptor, _LARGEST_PART + 1)
    finally:
        os.close(descriptor)
    if len(data) > _LARGEST_PART:
        raise BadFile(f"{file}: a part of an account has more than {_LARGEST_PART >> 20} MiB")
    _check_prolog(data[:_FIRST], file)
    try:
        root = read(data)
    except etree.XMLSyntaxError as exc:
        raise BadFile(f"{file}: not well-formed: {exc.msg}") from exc
    return root


def _check_prolog(start: bytes, file: Path) -> None:
    """Before libxml2 sees any of it: of a document type it would read what that refers to, whatever it was told."""
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start[:4]:
        raise BadFile(f"{file}: expected UTF-8")
    if _DOCTYPE.match(start):
        raise BadFile(f"{file}: it declares a document type, which is not allowed")
    if start and not _ROOT.match(start):
        raise BadFile(f"{file}: not well-formed: no element at its start")


def _open(file: Path) -> int:
    """A descriptor of a regular file: a pipe would never end."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as exc:
        raise BadFile(f"{file}: {exc.strerror if isinstance(exc, OSError) else exc}") from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise BadFile(f"{file}: no file")
    return descriptor
