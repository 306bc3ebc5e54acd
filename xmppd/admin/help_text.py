"""What `help` prints: the form is ejabberdctl's, the words are ours."""

import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from xmppd.admin.results import describe

if TYPE_CHECKING:
    from xmppd.admin.registry import Arg, Command

WIDTH: Final = 79

_SCOPES: Final = {
    "shared": "any node answers for all",
    "gather": "all nodes that are up are asked; --local: this one alone",
    "owner": "the nodes that hold the user's sessions are asked; --local: this one alone",
    "everywhere": "done on all nodes that are up; --local: on this one alone",
    "node": "about the node that is asked; --node asks another one",
    None: "about the node that is asked",
}


def one(command: "Command") -> str:
    """Everything about one command."""
    arguments = "\n             ".join(f"{arg.name}::{arg.type}{_note(arg)}" for arg in command.args)
    description = textwrap.fill(command.doc, WIDTH, initial_indent="  Description: ", subsequent_indent=" " * 15)
    return (
        f"  Command Name: {command.name}\n\n"
        f"  Arguments: {arguments}\n\n"
        f"  Returns: {describe(command.result)}\n\n"
        f"  Tags: {' '.join(command.tags)}\n\n"
        f"  Cluster: {_SCOPES[command.scope]}\n\n"
        f"  Module: {command.owner}\n\n"
        f"{description}\n"
    )


def _note(arg: "Arg") -> str:
    if arg.secret:
        return " (- reads it from standard input)"
    return " (optional)" if arg.optional else ""


def rows(commands: Iterable["Command"]) -> str:
    """Each command's usage and, below it, its description."""
    indent = " " * 13
    return "\n".join(
        f"  {c.usage}\n" + textwrap.fill(c.doc, WIDTH, initial_indent=indent, subsequent_indent=indent)
        for c in commands
    )


def by_tag(commands: Iterable["Command"]) -> str:
    """The names of the commands under each tag."""
    tags: dict[str, list[str]] = {}
    for command in commands:
        for tag in command.tags or ("other",):
            tags.setdefault(tag, []).append(command.name.replace(" ", "\xa0"))
    indent = " " * 5
    parts = ["Available tags and list of commands:\n"]
    for tag in sorted(tags):
        names = textwrap.fill(" ".join(tags[tag]), WIDTH, initial_indent=indent, subsequent_indent=indent)
        parts.append(f"  {tag}\n" + names.replace("\xa0", " ") + "\n")
    return "\n".join(parts).rstrip("\n")


def usages(commands: Iterable["Command"]) -> str:
    """For programs (shell completion): each command's name, a tab, the names of its arguments."""
    return "\n".join(f"{c.name}\t{' '.join(arg.name for arg in c.args)}" for c in commands)


def overview(commands: Iterable["Command"]) -> str:
    """The usage line and every command."""
    return (
        "Usage: xmppctl [--config FILE] [--node NAME] [--local] [--json] [--no-timeout] command [arguments]\n\n"
        "Commands that work without a running node:\n"
        "  start      Start the node in the background and wait until it serves\n"
        "  started    Wait until the node serves\n"
        "  stopped    Wait until the node has stopped\n"
        "  batch      Run commands from standard input, one a line\n\n"
        f"Commands of this node:\n{rows(commands)}\n\n"
        "help takes one of: commands, tags, a tag, a command, a pattern such as regist*"
    )
