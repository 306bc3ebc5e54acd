"""What a message looks like to a web server as ejabberd's XML. No I/O."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Final

from lxml.etree import QName, _Element

from xmppd.module_api import XML_LANG, hidden, text_of
from xmppd.protocol import ns

_LANGUAGE: Final = "en"  # ejabberd's own, which it writes where the client has not named one
_BODY: Final = f"{{{ns.CLIENT}}}body"
_SUBJECT: Final = f"{{{ns.CLIENT}}}subject"
_THREAD: Final = f"{{{ns.CLIENT}}}thread"


def ejabberd_xml(element: _Element, to: str, from_: str, *, hides: bool = False) -> bytes:
    """The element as ejabberd 23.01 writes it: single quotes, its order of attributes and children, `from` and
    `xml:lang` always there, and of the message's own children the bodies, subjects and threads last. `hides`: the text
    is left out."""
    attributes = element.attrib
    head = _head(attributes.get(XML_LANG) or _LANGUAGE, to, from_)
    for name in ("type", "id"):
        value = attributes.get(name)
        if value is not None:
            head += f" {name}='{_escape(value)}'"
    if len(element) == 1 and not hides:  # nearly always
        (child,) = element
        if child.tag == _BODY and not child.attrib and not len(child) and child.text:
            return f"{head} xmlns='jabber:client'><body>{_escape(child.text)}</body></message>".encode()
    others: list[str] = []
    own: dict[str, list[str]] = {_BODY: [], _SUBJECT: [], _THREAD: []}
    for child in element:
        kind = own.get(child.tag)
        if kind is not None:
            if not hides or child.tag == _BODY:
                kind.append(_own_child(child, hides))
        elif not hides:
            others.extend(_foreign(child, ns.CLIENT))
    parts = (head, " xmlns='jabber:client'>", *others, *own[_BODY], *own[_SUBJECT], *own[_THREAD], "</message>")
    return "".join(parts).encode()


@lru_cache(maxsize=4096)  # who talks does so for a while
def _head(lang: str, to: str, from_: str) -> str:
    return f"<message xml:lang='{_escape(lang)}' to='{_escape(to)}' from='{_escape(from_)}'"


def _own_child(child: _Element, hides: bool) -> str:
    """A body, a subject or a thread."""
    name, text = child.tag.rpartition("}")[2], text_of(child)
    attrs = ""
    if child.attrib:
        known = (("parent", child.get("parent")),) if name == "thread" else (("xml:lang", child.get(XML_LANG)),)
        attrs = _attributes({key: value for key, value in known if value is not None})
    if hides:
        attrs += _attributes({key: str(value) for key, value in hidden(text).items()})
        text = ""
    return f"<{name}{attrs}>{_escape(text)}</{name}>" if text else f"<{name}{attrs}/>"


def _escape(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace('"', "&quot;").replace("'", "&apos;")


def _attributes(attrs: dict[str, str]) -> str:
    return "".join(f" {name}='{_escape(value)}'" for name, value in attrs.items())


def _foreign(element: _Element, outer: str) -> Iterator[str]:
    """An element of somebody else's, whose surroundings are in the namespace `outer`; prefixes of names go."""
    name = QName(element)
    own = name.namespace or ""
    attrs: dict[str, str] = {"xmlns": own} if own != outer else {}
    for key, value in element.attrib.items():
        attr = QName(key)
        if key == XML_LANG or attr.namespace == "http://www.w3.org/XML/1998/namespace":
            attrs[f"xml:{attr.localname}"] = str(value)
        elif attr.namespace is None:
            attrs[attr.localname] = str(value)
        else:
            prefix = next(p for p, uri in element.nsmap.items() if p and uri == attr.namespace)
            attrs |= {f"xmlns:{prefix}": attr.namespace, f"{prefix}:{attr.localname}": str(value)}
    yield f"<{name.localname}{_attributes(attrs)}"
    if not element.text and not len(element):
        yield "/>"
        return
    yield ">"
    yield _escape(element.text or "")
    for child in element:
        if isinstance(child.tag, str):
            yield from _foreign(child, own)
        yield _escape(child.tail or "")
    yield f"</{name.localname}>"
