"""The command registry: one declaration serves xmppctl now, the HTTP API and ad-hoc commands later.

A command is a function or method that says what it takes and what it returns:

    class Roster(Module[Config]):
        @command(
            "add_rosteritem",
            args=(Arg("localuser"), Arg("localhost"), Arg("user"), Arg("host"), Arg("nick"), Arg("group"), Arg("subs")),
            result=Rescode(),
            tags=("roster",),
            doc="Add a contact to a user's roster, or change it; several groups are separated by `;`",
        )
        async def add_rosteritem(self, localuser: str, localhost: str, ...) -> None: ...

- It is called with the arguments by name (`from_` for an argument `from`), already of their type. A parameter named
  `call` gets a `Call`: who calls, progress, `--local`.
- It may be a plain function or a coroutine. The value it returns fits `result` (results.py).
- `scope` says whose answer it gives in a cluster, `merge` how the answers of several nodes become one:

      shared      the database's or the replicated tables': any node's answer is the cluster's
      gather      each node knows its own part: all that are up are asked
      owner       as gather, but only the nodes that hold sessions of the user it is about (`of`)
      everywhere  it is done on every node that is up
      node        it is about the node that is asked, and about no other

  Its function answers for this node alone where the call is `local`, which it is wherever several nodes are asked.
- A refusal is `raise CommandError(text, code)`: prints `Error: text`; code 1 unless docs/exit-codes.md names another
  one. Other errors of xmppd.errors are shown with their text; anything else is logged with its traceback and shown as
  an internal error.

The shapes of the commands that modules own (tests/golden/ejabberdctl-23.01/*.json has what each one prints):

    add_rosteritem     Rescode(); wrong addresses and unknown hosts are refused, an unknown user is not
    delete_rosteritem  Rescode(); an item that is not there is no error
    get_roster         List("contacts", Tuple("contact", (string("jid"), string("nick"), string("subscription"),
                       string("ask"), string("group")))); one row per group, a contact in none has one with an empty
                       group; `ask` is `undefined` where nothing is asked
    get_offline_count  integer("value")

Names are ejabberd's where it has the command, else `noun verb` with a blank; `noun_verb` finds those too, since HTTP
paths have no blanks.
"""

import difflib
import inspect
import itertools
import keyword
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Final, Literal, Protocol, TypeVar

from xmppd.admin import help_text
from xmppd.admin.merge import Merge, by_shape
from xmppd.admin.results import Answer, Result, Shape
from xmppd.errors import CommandError, XmppdError
from xmppd.log import get_logger

log = get_logger("admin")

ERROR: Final = 1
USAGE: Final = 2

ArgType = Literal["string", "integer", "list"]
Scope = Literal["shared", "gather", "owner", "everywhere", "node"]
SPREAD: Final = frozenset({"gather", "owner", "everywhere"})  # scopes that concern other nodes
PATIENCE: Final = 30.0  # seconds another node may work on its part of an answer
F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Arg:
    """One argument. A `list` is `a,b,c` on the command line; a `secret` is never shown, and `-` reads it from stdin."""

    name: str
    type: ArgType = "string"
    secret: bool = False
    optional: bool = False  # only behind all others; the handler's default stands in
    never_argv: bool = False  # a secret of the whole cluster: refused on a command line, where `ps` shows it

    @property
    def parameter(self) -> str:
        """The name in Python: `from_` for `from`."""
        return f"{self.name}_" if keyword.iskeyword(self.name) else self.name


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: how the request came (`ctl`, `http`, `adhoc`, `test`) and a name for the log (`uid=0`, a bare JID)."""

    via: str
    name: str


class Call:
    """One request on its way: given to handlers that have a parameter `call`."""

    def __init__(
        self,
        caller: Caller,
        *,
        local: bool = False,
        patient: bool = False,
        progress: Callable[[str], Awaitable[None]] | None = None,
    ) -> None:
        self.caller = caller
        self.local = local  # the answer is wanted for this node alone
        self.patient = patient  # whoever asks takes rows as they come, for as long as they come
        self._progress = progress

    async def progress(self, text: str) -> None:
        """One line of progress of long work; nothing happens where nobody shows it."""
        if self._progress is not None:
            await self._progress(text)


@dataclass(frozen=True, slots=True)
class Command:
    """A declaration, and once registered the function behind it and its owner (`core` or a module's name)."""

    name: str
    args: tuple[Arg, ...]
    result: Shape
    doc: str
    tags: tuple[str, ...] = ()
    reads: bool = False  # changes nothing; such calls are not written to the log
    scope: Scope | None = None  # None: nobody has decided; it answers as `node`
    merge: Merge | None = None
    of: Callable[[Mapping[str, Any]], str | None] | None = None  # the bare JID an `owner` command is about
    timeout: float = PATIENCE  # seconds another node may take
    layout: Callable[[Any], str] | None = None  # the printed form, where it is not that of the result's shape
    handler: Callable[..., Any] = field(default=lambda: None, repr=False)
    owner: str = ""
    wants_call: bool = False

    @property
    def usage(self) -> str:
        """`register user host password`."""
        return " ".join([self.name, *(f"[{a.name}]" if a.optional else a.name for a in self.args)])

    @property
    def least(self) -> int:
        return sum(not arg.optional for arg in self.args)


def command(
    name: str,
    *,
    args: Sequence[Arg] = (),
    result: Shape,
    doc: str,
    tags: Sequence[str] = (),
    reads: bool = False,
    scope: Scope | None = None,
    merge: Merge | None = None,
    of: Callable[[Mapping[str, Any]], str | None] | None = None,
    timeout: float = PATIENCE,
    layout: Callable[[Any], str] | None = None,
) -> Callable[[F], F]:
    """Declare a function or method as an admin command; whoever owns it registers it, for modules the loader does.

    Raises TypeError at import if the declaration and the function's parameters do not agree.
    """

    def mark(function: F) -> F:
        names = [arg.parameter for arg in args]
        parameters = [p for p in inspect.signature(function).parameters if p != "self"]
        if sorted(names) != sorted(p for p in parameters if p != "call") or len(set(names)) != len(names):
            raise TypeError(f"command {name!r} declares {names}, its function takes {parameters}")
        if any(a.optional and not b.optional for a, b in itertools.pairwise(args)):
            raise TypeError(f"command {name!r}: an optional argument stands before a required one")
        merged = (merge or by_shape(result, name)) if scope in SPREAD else None
        if scope == "owner" and of is None:
            raise TypeError(f"command {name!r} has owners and does not say whose they are")
        spec = Command(
            name,
            tuple(args),
            result,
            doc,
            tuple(tags),
            reads,
            scope,
            merged,
            of,
            timeout,
            layout,
            wants_call="call" in parameters,
        )
        function.__xmppd_command__ = spec  # type: ignore[attr-defined]
        return function

    return mark


def commands_of(source: object) -> list[Command]:
    """The commands an instance (or a module of functions) declares, bound to it, in the order of their names."""
    found = []
    # looked up on the class first: getattr on an instance would run its properties
    for name in dir(source):
        static = inspect.getattr_static(source, name)
        spec = getattr(static, "__xmppd_command__", None)
        if isinstance(spec, Command):
            found.append(_bound(spec, getattr(source, name)))
    return sorted(found, key=lambda spec: spec.name)


def _bound(spec: Command, handler: Callable[..., Any], owner: str = "") -> Command:
    return replace(spec, handler=handler, owner=owner or spec.owner)


class Elsewhere(Protocol):
    """The other nodes of the cluster, as the registry sees them (nodes.py)."""

    async def run(
        self, spec: Command, values: Mapping[str, Any], call: Call, here: Callable[[], Awaitable[Any]]
    ) -> Any:
        """The merged value of a command of a spread scope; `here` carries out this node's part. Raises CommandError."""
        ...


class Registry:
    """All commands of this node by name."""

    def __init__(self) -> None:
        self._commands: dict[str, Command] = {}
        self._elsewhere: Elsewhere | None = None

    def connect(self, elsewhere: Elsewhere) -> None:
        """Hand in the other nodes; until then this one answers for itself."""
        self._elsewhere = elsewhere

    def register(self, owner: str, commands: Iterable[Command | Callable[..., Any]]) -> None:
        """Add an owner's commands, all or none. Raises ValueError where a name is taken."""
        added: dict[str, Command] = {}
        for item in commands:
            spec = item if isinstance(item, Command) else _bound(item.__xmppd_command__, item)  # type: ignore[attr-defined]
            taken = self._commands.get(spec.name) or added.get(spec.name)
            if taken is not None:
                raise ValueError(f"the command {spec.name!r} of {owner} is already one of {taken.owner}")
            added[spec.name] = _bound(spec, spec.handler, owner)
        self._commands.update(added)

    def unregister(self, owner: str) -> None:
        """Forget an owner's commands; calls that are running end by themselves."""
        self._commands = {name: spec for name, spec in self._commands.items() if spec.owner != owner}

    def names(self) -> list[str]:
        return sorted(self._commands)

    def commands(self) -> list[Command]:
        return [self._commands[name] for name in self.names()]

    def get(self, name: str) -> Command:
        """Raises CommandError (usage) with the nearest name where there is none of this name."""
        spec = self._commands.get(name) or self.by_path(name)
        if spec is None:
            raise CommandError(self._unknown(name), USAGE)
        return spec

    def by_path(self, path: str) -> Command | None:
        """The command whose name, with `_` for a blank, this is."""
        return next((spec for name, spec in self._commands.items() if name.replace(" ", "_") == path), None)

    def split(self, argv: Sequence[str]) -> tuple[Command, Sequence[str]]:
        """The command an argv names, by one word or two (`module list`), and the arguments behind it."""
        if len(argv) > 1 and f"{argv[0]} {argv[1]}" in self._commands:
            return self._commands[f"{argv[0]} {argv[1]}"], argv[2:]
        if argv[0] in self._commands:
            return self._commands[argv[0]], argv[1:]
        verbs = [name for name in self.names() if name.startswith(f"{argv[0]} ")]
        if verbs:
            lines = "".join(f"  {self._commands[name].usage}\n" for name in verbs)
            said = f"unknown command '{' '.join(argv[:2])}'" if len(argv) > 1 else f"'{argv[0]}' what?"
            raise UsageError(f"{said} There are:\n{lines}".rstrip())
        return self.get(argv[0]), argv[1:]

    def _unknown(self, name: str) -> str:
        near = difflib.get_close_matches(name, self._commands, n=1, cutoff=0.5)
        return f"unknown command '{name}'." + (f" Did you mean '{near[0]}'?" if near else "")

    def help(self, topic: str | None = None) -> str:
        """The text of `help [commands | tags | usage | TAG | COMMAND | PATTERN]`."""
        commands = self.commands()
        if topic is None or topic == "commands":
            return help_text.overview(commands)
        if topic == "tags":
            return help_text.by_tag(commands)
        if topic == "usage":
            return help_text.usages(commands)
        if topic in self._commands or self.by_path(topic) is not None:
            return help_text.one(self.get(topic))
        found = [c for c in commands if topic in c.tags or topic == c.name.partition(" ")[0]]
        found = found or [c for c in commands if fnmatchcase(c.name, topic)]
        return help_text.rows(found) if found else f"No tag or command matches '{topic}'"

    async def call(
        self, name: str, args: Sequence[str] | Mapping[str, Any], *, caller: Caller, call: Call | None = None
    ) -> Result:
        """Run a command with arguments in order (texts) or by name (JSON values).

        Raises CommandError: UsageError (code 2), the command's own refusal, or an internal error (code 1) whose cause
        is in the log.
        """
        spec = self.get(name)
        values = by_position(spec, args) if not isinstance(args, Mapping) else by_name(spec, args)
        call = call or Call(caller)
        began = time.monotonic()
        code = ERROR
        try:
            result = Result(spec.result, await self._value(spec, values, call), layout=spec.layout)
            if isinstance(result.value, Answer):
                told = result.value
                result = replace(result, value=told.value, exit=told.code, notes=told.notes)
            code = result.code
            return result
        except CommandError as exc:
            code = exc.code
            raise
        except XmppdError as exc:
            raise CommandError(str(exc) or type(exc).__name__, ERROR) from exc
        except Exception as exc:
            # the exception's own text may hold parameters of a statement, so it goes to the log alone
            log.error("command failed", exc=exc, command=spec.name, via=caller.via, caller=caller.name)
            raise InternalError(f"the command '{spec.name}' failed ({type(exc).__name__}), see the log") from exc
        finally:
            if not spec.reads:
                ms = round((time.monotonic() - began) * 1000)
                log.info("command done", command=spec.name, via=caller.via, caller=caller.name, code=code, ms=ms)

    async def _value(self, spec: Command, values: dict[str, Any], call: Call) -> Any:
        async def here() -> Any:
            part = Call(call.caller, local=call.local or spread, patient=call.patient, progress=call.progress)
            found = spec.handler(**values, call=part) if spec.wants_call else spec.handler(**values)
            return await found if inspect.isawaitable(found) else found

        spread = spec.scope in SPREAD and self._elsewhere is not None
        if not spread or call.local:
            return await here()
        assert self._elsewhere is not None
        return await self._elsewhere.run(spec, values, call, here)


class InternalError(CommandError):
    """A command failed in a way it should not; the cause is in the log."""


class UsageError(CommandError):
    """The request itself is wrong: exit code 2. `help` is the command's help where it is to be shown with the error."""

    def __init__(self, text: str, help: str = "") -> None:
        super().__init__(text, USAGE)
        self.help = help


def by_position(spec: Command, args: Sequence[str]) -> dict[str, Any]:
    """Arguments in order; raises UsageError with the command's help where their number is wrong."""
    missing, surplus = spec.least - len(args), len(args) - len(spec.args)
    if missing > 0 or surplus > 0:
        count = f"{missing} more" if missing > 0 else f"{surplus} less"
        # ejabberd says "argument" for any number of them
        raise UsageError(f"the command '{spec.name}' requires {count} argument.", help_text.one(spec))
    return {arg.parameter: _typed(arg, value) for arg, value in zip(spec.args, args, strict=False)}


def by_name(spec: Command, args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; raises UsageError naming what is missing or unknown."""
    known = {arg.name: arg for arg in spec.args}
    for name in args:
        if name not in known:
            raise UsageError(f"the command '{spec.name}' has no argument '{name}'")
    missing = [arg.name for arg in spec.args if not arg.optional and arg.name not in args]
    if missing:
        raise UsageError(f"the command '{spec.name}' lacks the argument '{missing[0]}'")
    return {known[name].parameter: _typed(known[name], value) for name, value in args.items()}


def _typed(arg: Arg, value: Any) -> Any:
    if arg.type == "string" and isinstance(value, str):
        _check_text(arg, value)
        return value
    if arg.type == "integer":
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        # bounded: int() of a very long text takes quadratic time, and accepts blanks and underscores
        if (
            isinstance(value, str)
            and len(value) < 20
            and value.removeprefix("-").isascii()
            and value.removeprefix("-").isdigit()
        ):
            return int(value)
    if arg.type == "list":
        if isinstance(value, str):
            _check_text(arg, value)
            return value.split(",") if value else []
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            for item in value:
                _check_text(arg, item)
            return value
    words = {"string": "a text", "integer": "a whole number", "list": "a list of texts"}[arg.type]
    got = "" if arg.secret else f", got {value!r:.60}"
    raise UsageError(f"argument '{arg.name}': expected {words}{got}")


def _check_text(arg: Arg, value: str) -> None:
    # half a surrogate pair (argv that was no UTF-8) and NUL would only fail later, in a database or on a stream
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UsageError(f"argument '{arg.name}': not UTF-8") from None
    if "\0" in value:
        raise UsageError(f"argument '{arg.name}': contains a NUL character")
