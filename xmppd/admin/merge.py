"""How the answers of several nodes become one.

A merge takes the answers by the node's name, of those that answered: at least one, the node that was asked first, the
others sorted by name. It returns a value of the command's shape.
"""

import heapq
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from xmppd.admin.results import Rescode, Restuple, Scalar, Shape

Answers = Mapping[str, Any]
Merge = Callable[[Answers], Any]


def total(answers: Answers) -> int:
    """The sum."""
    return sum(answers.values())


def done(answers: Answers) -> bool:
    """Done where every node has done it."""
    return all(answer is not False for answer in answers.values())


def each(answers: Answers) -> str:
    """One text where all say the same, else one paragraph per node, its lines behind the node's name."""
    texts = {node: str(text or "") for node, text in answers.items()}
    if len(set(texts.values())) == 1:
        return next(iter(texts.values()))
    lines = [f"{node}: {line}" for node, text in texts.items() for line in text.splitlines() or ["nothing to do"]]
    return "\n".join(lines)


def agreed(answers: Answers) -> str:
    """The value where all nodes have the same, else that of the node asked, with the others' behind it."""
    (_, value), *others = answers.items()
    differing = [f"{node}: {other}" for node, other in others if other != value]
    return f"{value} ({', '.join(differing)})" if differing else str(value)


def ordered(key: Callable[[Any], Any]) -> Merge:
    """Lists that each node has sorted by `key`, as one sorted list; walked only when it is printed."""

    def merge(answers: Answers) -> Iterable[Any]:
        return heapq.merge(*answers.values(), key=key)

    return merge


_DEFAULTS: Final[Mapping[type, Merge]] = {Rescode: done, Restuple: each}


def by_shape(shape: Shape, command: str) -> Merge:
    """The merge of a command that names none. Raises TypeError where there is no natural one."""
    merge = _DEFAULTS.get(type(shape))
    if merge is None and isinstance(shape, Scalar) and shape.type == "integer":
        merge = total
    if merge is None:
        raise TypeError(f"command {command!r} does not say how the answers of several nodes are merged")
    return merge
