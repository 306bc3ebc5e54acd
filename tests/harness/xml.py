"""XML as a second, independent parser (expat) sees it: what the server reads and writes is held against this."""

from typing import Any
from xml.parsers import expat

HEADER = (
    b"<stream:stream xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'"
    b" to='localhost' version='1.0'>"
)

SEPARATOR = "\x01"  # expat refuses a namespace that contains it

# (name with namespace, sorted attributes, children: nodes and joined texts)
Node = tuple[str, tuple[tuple[str, str], ...], tuple[Any, ...]]


class _Builder:
    def __init__(self) -> None:
        self.stack: list[tuple[str, tuple[tuple[str, str], ...], list[Any]]] = []
        self.children: list[Node] = []  # of the root, as they are finished
        self.texts: list[str] = []  # directly inside the root
        self.header_seen = False
        self.closed = False

    def start(self, name: str, attributes: dict[str, str]) -> None:
        self.header_seen = True
        named = {key.replace(SEPARATOR, " "): value for key, value in attributes.items()}
        self.stack.append((name.replace(SEPARATOR, " "), tuple(sorted(named.items())), []))

    def end(self, name: str) -> None:
        name, attributes, children = self.stack.pop()
        node = (name, attributes, tuple(children))
        if len(self.stack) == 1:
            self.children.append(node)
        elif self.stack:
            self.stack[-1][2].append(node)
        else:
            self.closed = True

    def text(self, data: str) -> None:
        if len(self.stack) == 1:
            self.texts.append(data)
        elif self.stack:
            children = self.stack[-1][2]
            if children and isinstance(children[-1], str):
                children[-1] += data
            else:
                children.append(data)


def parse_stream(data: bytes) -> tuple[list[Node], list[str], bool]:
    """The finished children of the root, the texts between them, and whether all of `data` is well-formed so far."""
    builder = _Builder()
    parser = expat.ParserCreate(namespace_separator=SEPARATOR)
    parser.StartElementHandler = builder.start
    parser.EndElementHandler = builder.end
    parser.CharacterDataHandler = builder.text
    try:
        parser.Parse(data, False)
    except expat.ExpatError:
        return builder.children, builder.texts, False
    return builder.children, builder.texts, True


def inside_a_stream(xml: bytes) -> Node:
    """The one node that these bytes are inside a client stream; they must be nothing but that, and close everything."""
    children, texts, whole = parse_stream(HEADER + xml + b"<end/>")
    assert whole, f"not well-formed inside a stream: {xml!r}"
    assert texts == [], f"text beside the element: {xml!r}"
    assert len(children) == 2, f"not one element: {xml!r}"
    assert children[1] == ("jabber:client end", (), ()), f"changes what follows: {xml!r}"
    return children[0]


def with_attribute(node: Node, name: str, value: str) -> Node:
    """The node with one more attribute, or another value for it."""
    return node[0], tuple(sorted({**dict(node[1]), name: value}.items())), node[2]
