"""How libxml2, below lxml, is kept from remembering what strangers say, and from keeping what they did not finish.

It keeps every name it reads (of elements, attributes, prefixes, namespaces, and some runs of blanks) in a table that
lxml shares between all documents of a thread, for the life of the process: names that somebody invents would be memory
lost for ever. lxml finds that table under a key of the thread's state, so a document that begins under a `NameTable`
has a table of its own, which goes when the document goes. When a later lxml does this otherwise nothing breaks, and
names are remembered again, as many as `Limits.names` lets in; tests/unit/test_libxml.py would tell.
"""

import ctypes
from typing import Any, Final, cast

from lxml import etree
from lxml.etree import _Element

from xmppd.protocol import ns

_WRAP: Final = f'<w xmlns="{ns.CLIENT}" xmlns:stream="{ns.STREAMS}">%b</w>'.encode()
_KEY: Final = "_ParserDictionaryContext"
_READER: Final = "xmppd.protocol.libxml"
_READ_AT_MOST: Final = 1 << 20  # bytes of documents whose names share one table
_thread_state = ctypes.pythonapi.PyThreadState_GetDict
_thread_state.restype = ctypes.c_void_p  # a borrowed reference, which py_object would give back
_thread_state.argtypes = []


def _thread() -> dict[str, Any]:
    return cast(dict[str, Any], ctypes.cast(_thread_state(), ctypes.py_object).value)


class NameTable:
    """A context manager: a document that begins inside of it keeps its names in this table.

    Whatever goes on with the parser of such a document (`feed`, `close`) must go on inside of it, too: where parsing
    ends, lxml gives the document the table that counts at that time, and frees the other. All of it in one thread.
    """

    __slots__ = ("_former", "_table", "_thread")

    def __init__(self) -> None:
        self._thread = _thread()
        self._table: object = None  # lxml's; it makes one when it finds none
        self._former: object = None

    def __enter__(self) -> None:
        thread = self._thread
        self._former = thread.pop(_KEY, None)
        if self._table is not None:
            thread[_KEY] = self._table

    def __exit__(self, *exc: object) -> None:
        thread = self._thread
        self._table = thread.pop(_KEY, None)
        if self._former is not None:
            thread[_KEY] = self._former
            self._former = None


class _Reader:
    """Reads whole documents. Their names are remembered for a while only."""

    __slots__ = ("_left", "_names", "_parser")

    def __init__(self) -> None:
        # Without the ids: two of one value are no error for the stream's parser, so they must not be one here.
        self._parser = etree.XMLParser(resolve_entities=False, no_network=True, huge_tree=False, collect_ids=False)
        self._names = NameTable()
        self._left = _READ_AT_MOST

    def read(self, xml: bytes) -> _Element | None:
        """The root; None when as much has been read as may share a table. Raises etree.XMLSyntaxError."""
        self._left -= len(xml)
        if self._left < 0 and self._left + len(xml) < _READ_AT_MOST:
            return None
        with self._names:
            return etree.fromstring(xml, self._parser)


def read(xml: bytes) -> _Element:
    """The root of this document, which refers to nothing outside of it. Raises etree.XMLSyntaxError."""
    thread = _thread()
    reader: _Reader | None = thread.get(_READER)
    root = reader.read(xml) if reader is not None else None
    if root is None:
        reader = thread[_READER] = _Reader()  # with another parser, too: a parser does not let go of its table
        root = reader.read(xml)
    assert root is not None
    return root


def read_neutral(xml: bytes) -> _Element:
    """The stanza whose neutral bytes (stanza.py) these are; ValueError when they are none."""
    try:
        wrapper = read(_WRAP % xml)
    except etree.XMLSyntaxError as exc:
        raise ValueError(f"not well-formed: {exc.msg}") from exc
    if len(wrapper) != 1:
        raise ValueError("not one element")
    return wrapper[0]


_ASIDE: Final = etree.XMLParser(resolve_entities=False, no_network=True)


def give_up(parser: "etree.XMLPullParser", root: _Element | None, names: NameTable) -> None:
    """Let a pull parser be freed at once, wherever in its document it was; nothing may be fed to it any more.

    `root` is its document's, if there is one. The two refer to each other until the document is finished, with all
    that has come of it, and the collector, which knows nothing of that memory, looks for them when it likes. So the
    parsing is ended by force, which makes the parser forget the document; the elements that it still believes to be
    open are moved to another document with the same names, which is nobody's.
    """
    with names:
        try:
            if root is None:
                parser.feed(b"<a/>")  # a document that has not begun refers to its parser, too
            parser.close()
        except etree.XMLSyntaxError:
            pass
        if root is not None:
            _ASIDE.makeelement("aside").append(root)
