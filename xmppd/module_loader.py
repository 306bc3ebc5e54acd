"""Finds, sorts, starts and stops modules; registers what they declare and takes it back.

A name under `modules:` is looked for in the folders of `module_paths:`, then among the bundled modules, then in the
entry-point group `xmppd.modules`. Folders of `module_paths` are loaded under private package names, so that they cannot
shadow anything.
"""

import asyncio
import difflib
import functools
import gc
import importlib
import importlib.util
import itertools
import sys
import typing
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import entry_points
from inspect import isclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from xmppd.access import Access, AccessRules
from xmppd.admin.registry import Registry, commands_of
from xmppd.errors import CommandError, ConfigError, XmppdError
from xmppd.hooks import Hooks
from xmppd.housekeeping import Retentions
from xmppd.iq import IqHandlers
from xmppd.log import get_logger
from xmppd.module_api import Context, HookMark, IqMark, Module, NodeMark
from xmppd.nodes import NodeHandlers

_log = get_logger("xmppd.modules")
_BUNDLED: Final = "modules"
_ENTRY_POINTS: Final = "xmppd.modules"
_PRIVATE: Final = "_xmppd_site_modules"
_API_NUMBER: Final = 1
_UNKNOWN: Final = 13  # docs/exit-codes.md
_STATE: Final = 14
_TASK: Final = ": "  # between a module's name and the one it gives to a task
_PATIENCE: Final = 5.0  # seconds for a module's tasks to end
_COLLECT_AFTER: Final = 10  # modules that were stopped


@dataclass(slots=True)
class Loaded:
    """A running module."""

    name: str
    source: str  # the file it came from
    rank: int  # its place among the handlers of an event, which a reload keeps
    instance: Module[Any]
    tasks: set[asyncio.Task[None]] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class ModuleInfo:
    """A module for an operator's eyes."""

    name: str
    state: str  # loaded, or available
    source: str


@dataclass(frozen=True, slots=True)
class ModuleUse:
    """What a module has in the server. Everything is 0 when a module is not loaded."""

    name: str  # or `core`: what is the server's own
    hooks: int
    iqs: int
    commands: int
    tasks: int


Validate = Callable[[type[Any], Mapping[str, Any], str], Any]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A `modules:` section that was found to be right: each module's class and its validated options."""

    options: Mapping[str, Mapping[str, Any]]
    modules: Mapping[str, tuple[type[Module[Any]], Any]]
    order: Sequence[str]


class ModuleLoader:
    """All modules of a node."""

    def __init__(
        self,
        *,
        hooks: Hooks,
        iqs: IqHandlers,
        registry: Registry,
        context: Callable[[str], Context],
        validate: Validate,
        access: Access,
        paths: Sequence[Path] = (),
        nodes: NodeHandlers | None = None,
        retentions: Retentions | None = None,
    ) -> None:
        self._nodes = nodes or NodeHandlers()
        self._retentions = retentions or Retentions()
        self._hooks = hooks
        self._iqs = iqs
        self._registry = registry
        self._context = context
        self._validate = validate
        self._access = access
        self._paths = tuple(paths)
        self._loaded: dict[str, Loaded] = {}
        self._options: Mapping[str, Mapping[str, Any]] = {}
        self._lock = asyncio.Lock()
        self._ranks = itertools.count()
        self._stopped = 0

    # -- what others ask

    def loaded(self, name: str) -> bool:
        """Whether a module runs."""
        return name in self._loaded

    def features(self) -> list[str]:
        """Service discovery features of the hosts, as the modules declare them."""
        return sorted({feature for module in self._loaded.values() for feature in module.instance.features})

    def account_features(self) -> list[str]:
        """Service discovery features of accounts."""
        return sorted({feature for module in self._loaded.values() for feature in module.instance.account_features})

    def service(self, protocol: type) -> Any:
        """The module that provides a service protocol; LookupError when none does."""
        for module in self._loaded.values():
            if protocol in module.instance.provides:
                return module.instance
        raise LookupError(f"no loaded module provides {protocol.__name__}")

    def modules(self) -> list[ModuleInfo]:
        """Every module that runs or could be loaded."""
        known = dict.fromkeys(self._available(), "available")
        found = [
            ModuleInfo(name, "loaded" if name in self._loaded else state, self._source(name))
            for name, state in {**known, **dict.fromkeys(self._loaded, "loaded")}.items()
        ]
        return sorted(found, key=lambda info: info.name)

    def uses(self) -> list[ModuleUse]:
        """What each module has registered and runs, whatever is left of unloaded ones included, by name."""
        hooks, iqs = self._hooks.owners(), self._iqs.owners()
        commands = Counter(command.owner for command in self._registry.commands())
        # By their names: tasks that outlived their module are to be seen, too.
        tasks = Counter(task.get_name().split(_TASK)[0] for task in asyncio.all_tasks() if _TASK in task.get_name())
        names = sorted({*self._loaded, *hooks, *iqs, *commands, *tasks})
        return [ModuleUse(name, hooks[name], iqs[name], commands[name], tasks[name]) for name in names]

    def tables(self, names: Sequence[str]) -> list[Any]:
        """The tables that modules declare, without starting them."""
        return [table for name in names for table in self._class_of(self._import(name), name).tables]

    # -- configuration

    def prepare(
        self,
        modules: Mapping[str, Mapping[str, Any]],
        *,
        validate: Validate | None = None,
        access: AccessRules | None = None,
    ) -> Prepared:
        """Every name exists and every option is right, or ConfigError with all problems; nothing is started.

        `validate` and `access` where they differ from those in force: for a configuration that is being considered."""
        problems: list[str] = []
        prepared: dict[str, tuple[type[Module[Any]], Any]] = {}
        for name, options in modules.items():
            try:
                prepared[name] = self._checked(self._import(name), name, options, validate, access)
            except ConfigError as exc:
                problems += exc.problems
        for name, (cls, _) in prepared.items():
            problems += [
                f"modules.{name}: needs the module {other}, which is not listed"
                for other in cls.requires
                if other not in modules
            ]
        if problems:
            raise ConfigError(problems)
        return Prepared(modules, prepared, _in_order({name: cls.requires for name, (cls, _) in prepared.items()}))

    def _checked(
        self,
        python_module: ModuleType,
        name: str,
        options: Mapping[str, Any],
        validate: Validate | None = None,
        access: AccessRules | None = None,
    ) -> tuple[type[Module[Any]], Any]:
        """A module's class and its options; ConfigError."""
        cls = self._class_of(python_module, name)
        config = (validate or self._validate)(_config_of(python_module), options, f"modules.{name}")
        wrong = list(cls.check_options(config, access or self._access.rules))
        if wrong:
            raise ConfigError([f"modules.{name}.{words}" for words in wrong])
        return cls, config

    # -- life

    async def start(self, modules: Mapping[str, Mapping[str, Any]]) -> None:
        """Load everything that is configured, each after what it requires; ConfigError before anything started."""
        prepared = self.prepare(modules)
        self._options = modules
        for name in prepared.order:
            await self._start(name, *prepared.modules[name])
        _log.info("modules loaded", modules=",".join(self._loaded))

    async def stop(self) -> None:
        """Unload everything, in reverse order."""
        for name in reversed(list(self._loaded)):
            await self._stop(name)

    async def load(self, name: str) -> None:
        """Load one module at run time, with its options from the configuration if it has any there. CommandError when
        it runs already, is not there or needs another one; ConfigError when its code or its options are wrong."""
        async with self._lock:
            await self._load(name)
        _log.info("module loaded", module=name)

    async def unload(self, name: str) -> None:
        """Unload one module; CommandError when it does not run or another one needs it."""
        async with self._lock:
            self._must_run(name)
            self._nobody_needs(name)
            await self._stop(name)
            self._tidy_up(1)
        _log.info("module unloaded", module=name)

    async def reload(self, name: str) -> None:
        """Start a module again with its files of now; those that require it keep running meanwhile. The old one serves
        until the new one is ready, and goes on where the new one is wrong (ConfigError) or does not start."""
        async with self._lock:
            self._must_run(name)
            python_name = type(self._loaded[name].instance).__module__
            forgotten = _forget_code(python_name)
            try:
                python_module = self._import(name)
                cls, config = self._checked(python_module, name, self._options.get(name, {}))
                self._needs_nothing_more(name, cls)
                await self._replace(name, cls, config)
                self._tidy_up(1)
            except BaseException:
                _forget_code(python_name)
                _restore_code(forgotten)
                raise
        _log.info("module reloaded", module=name)

    async def apply(self, prepared: Prepared) -> None:
        """Go over to another `modules:` section: unload, load, restart what differs.

        All or nothing: when a module refuses to start, those that were there before are started again with the options
        they had, and ConfigError tells which one refused, and why."""
        async with self._lock:
            before, self._options = self._options, prepared.options
            undo: list[Callable[[], Awaitable[None]]] = []
            try:
                for name in reversed(list(self._loaded)):
                    if name not in prepared.options:
                        undo.append(functools.partial(self._enter, self._loaded[name]))
                        await self._stop(name)
                for name in prepared.order:
                    if name not in self._loaded:
                        await self._start(name, *prepared.modules[name])
                        undo.append(functools.partial(self._stop, name))
                    elif dict(before.get(name, {})) != dict(prepared.options[name]):
                        old = self._loaded[name]
                        await self._replace(name, *prepared.modules[name])
                        undo.append(functools.partial(self._put_back, old))
            except BaseException as exc:
                self._options = before
                lost = await self._go_back(undo)
                if isinstance(exc, XmppdError):
                    raise ConfigError([*getattr(exc, "problems", [str(exc)]), *lost]) from exc
                raise
            self._tidy_up(len(undo))

    async def _go_back(self, undo: Sequence[Callable[[], Awaitable[None]]]) -> list[str]:
        """The last step first. Lines about modules that did not come back."""
        problems: list[str] = []
        for step in reversed(undo):
            try:
                await step()
            except XmppdError as exc:
                problems.append(f"{exc} (this is how it was before, and it does not start again)")
        return problems

    async def _put_back(self, old: Loaded) -> None:
        """A module as it was before it was replaced."""
        new = self._loaded[old.name]
        await _end_tasks(new)
        await self._leave(new)
        await self._enter(old)

    async def _load(self, name: str) -> None:
        if name in self._loaded:
            raise CommandError(f"the module {name} is loaded already", _STATE)
        if name not in self._available():
            raise CommandError(self._unknown(name), _UNKNOWN)
        cls, config = self._checked(self._import(name), name, self._options.get(name, {}))
        self._needs_nothing_more(name, cls)
        await self._start(name, cls, config)

    def _needs_nothing_more(self, name: str, cls: type[Module[Any]]) -> None:
        missing = [other for other in cls.requires if other not in self._loaded]
        if missing:
            raise CommandError(f"the module {name} needs {', '.join(missing)}", _STATE)

    def _must_run(self, name: str) -> None:
        if name not in self._loaded:
            known = name in self._available()
            text = f"the module {name} is not loaded" if known else self._unknown(name)
            raise CommandError(text, _STATE if known else _UNKNOWN)

    def _nobody_needs(self, name: str) -> None:
        needing = [other for other, loaded in self._loaded.items() if name in loaded.instance.requires]
        if needing:
            raise CommandError(f"the module {name} is needed by {', '.join(sorted(needing))}", _STATE)

    async def _start(self, name: str, cls: type[Module[Any]], config: Any) -> None:
        loaded = await self._build(name, cls, config, next(self._ranks))
        await self._enter(loaded)
        _log.debug("module loaded", module=name)

    async def _stop(self, name: str) -> None:
        await _end_tasks(self._loaded[name])
        await self._leave(self._loaded.pop(name))
        _log.debug("module unloaded", module=name)

    async def _replace(self, name: str, cls: type[Module[Any]], config: Any) -> None:
        """From the end of the old one's tasks to the start of the new one nothing waits, unless their own `stop` and
        `start` do: no stanza finds the module missing."""
        old = self._loaded[name]
        new = await self._build(name, cls, config, old.rank)
        await _end_tasks(old)
        await self._leave(old)
        try:
            await self._enter(new)
        except BaseException:
            _log.warning("module goes on as it was", module=name)
            await self._enter(old)
            raise

    async def _build(self, name: str, cls: type[Module[Any]], config: Any, rank: int) -> Loaded:
        """An instance with its tables, which nobody knows yet."""
        tasks: set[asyncio.Task[None]] = set()
        context = self._context(name)
        spawn = context.spawn

        def spawn_owned(coroutine: Coroutine[Any, Any, None], *, name: str) -> object:
            task = spawn(coroutine, name=f"{context.name}{_TASK}{name}")
            if isinstance(task, asyncio.Task):
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            return task

        context.spawn = spawn_owned
        context.notify, context.decide = self._hooks.notify, self._hooks.decide
        context.switch = functools.partial(self._switch, name)
        context.retention = functools.partial(self._retentions.add, name)
        source = self._source(name)
        with _named(name):
            loaded = Loaded(name, source, rank, cls(context, config), tasks)
            if cls.tables and source != "bundled":  # the bundled ones are in the migrations
                await context.storage.ensure_tables(cls.tables)
        return loaded

    async def _enter(self, loaded: Loaded) -> None:
        """Register what the module declares, and start it. When that fails nothing of it is left."""
        name, before = loaded.name, self._loaded.get(loaded.name)
        try:
            with _named(name):
                self._register(loaded)
                self._loaded[name] = loaded
                await loaded.instance.start()
        except BaseException:
            self._unregister(loaded)
            if before in (None, loaded):
                self._loaded.pop(name, None)
            else:
                self._loaded[name] = before
            await _end_tasks(loaded)
            raise

    async def _leave(self, loaded: Loaded) -> None:
        """Take back what it has registered, and stop it. Calls that are under way end by themselves."""
        self._unregister(loaded)
        try:
            await loaded.instance.stop()
        except Exception as exc:
            _log.error("module did not stop properly", module=loaded.name, exc=exc)
        self._unregister(loaded)  # what `stop` may have switched on
        if loaded.instance.tables:
            loaded.instance.storage.forget_statements()

    def _tidy_up(self, stopped: int) -> None:
        """Code that was unloaded is full of cycles; with our thresholds it would stay for hours. Looking for it takes
        long on a node with many sessions, so it is not done each time."""
        self._stopped += stopped
        if self._stopped >= _COLLECT_AFTER:
            self._stopped = 0
            for forget in getattr(typing, "_cleanups", ()):
                forget()  # it remembers the last 128 of each, `Module[Config]`, `Annotated[...]`, and the code behind
            gc.collect()

    def _register(self, loaded: Loaded) -> None:
        name, instance = loaded.name, loaded.instance
        for call, marks in _marked(instance, "_xmppd_hooks"):
            for mark in marks:
                assert isinstance(mark, HookMark)
                if not mark.switched:
                    self._add_hook(loaded, call, mark)
        for call, marks in _marked(instance, "_xmppd_iqs"):
            for mark in marks:
                assert isinstance(mark, IqMark)
                for target in mark.targets:
                    self._iqs.add(name, target, mark.type, mark.namespace, mark.name, call, anonymous=mark.anonymous)
        for call, marks in _marked(instance, "_xmppd_nodes"):
            for mark in marks:
                assert isinstance(mark, NodeMark)
                self._nodes.add(name, mark.topic, call)
        self._registry.register(name, commands_of(instance))

    def _add_hook(self, loaded: Loaded, call: Callable[..., Any], mark: HookMark) -> None:
        self._hooks.add(loaded.name, mark.event, call, after=mark.after, optional=mark.optional, rank=loaded.rank)

    def _switch(self, name: str, event: type, on: bool) -> None:
        """Register a module's handlers that it switches itself, or take them back."""
        loaded = self._loaded.get(name)
        if loaded is None:
            return  # it is not started yet
        self._hooks.remove(name, event)
        for call, marks in _marked(loaded.instance, "_xmppd_hooks"):
            for mark in marks:
                if mark.event is event and (on or not mark.switched):
                    self._add_hook(loaded, call, mark)

    def _unregister(self, loaded: Loaded) -> None:
        self._hooks.remove(loaded.name)
        self._iqs.remove(loaded.name)
        self._nodes.remove(loaded.name)
        self._retentions.remove(loaded.name)
        self._registry.unregister(loaded.name)

    # -- finding

    def _import(self, name: str) -> ModuleType:
        """The Python module behind a name; ConfigError when there is none, or it is broken."""
        if not name.isidentifier():
            raise ConfigError([f"modules.{name}: not a module name"])
        try:
            for index, folder in enumerate(self._paths):
                found = _import_from(folder, index, name)
                if found is not None:
                    return found
            if name in _bundled():
                return importlib.import_module(f"{_BUNDLED}.{name}")
            for point in entry_points(group=_ENTRY_POINTS, name=name):
                loaded = point.load()
                return loaded if isinstance(loaded, ModuleType) else sys.modules[loaded.__module__]
        except ConfigError:
            raise
        except Exception as exc:
            _log.error("module cannot be imported", module=name, exc=exc)
            raise ConfigError([f"modules.{name}: cannot be imported: {type(exc).__name__}: {exc}"]) from exc
        raise ConfigError([f"modules.{name}: unknown module{self._hint(name)}"])

    def _unknown(self, name: str) -> str:
        return f"there is no module called '{name}'{self._hint(name)}"

    def _hint(self, name: str) -> str:
        nearest = difflib.get_close_matches(name, self._available(), n=1)
        return f". Did you mean {nearest[0]}?" if nearest else ""

    def _available(self) -> list[str]:
        names = set(_bundled()) | {point.name for point in entry_points(group=_ENTRY_POINTS)}
        for folder in self._paths:
            names |= set(_names_in(folder))
        return sorted(names)

    def _class_of(self, python_module: ModuleType, name: str) -> type[Module[Any]]:
        classes = [
            value
            for value in vars(python_module).values()
            if isclass(value) and issubclass(value, Module) and value.__module__.startswith(python_module.__name__)
        ]
        if len(classes) != 1:
            raise ConfigError(
                [f"modules.{name}: a module has exactly one subclass of Module, this one has {len(classes)}"]
            )
        return classes[0]

    def _source(self, name: str) -> str:
        for folder in self._paths:
            if name in _names_in(folder):
                return str(folder)
        return "bundled" if name in _bundled() else "package"


@dataclass(frozen=True, slots=True)
class NoOptions:
    """The configuration of a module that declares none."""


def _config_of(python_module: ModuleType) -> type[Any]:
    config: type[Any] = getattr(python_module, "Config", NoOptions)
    return config


def _marked(instance: object, attribute: str) -> Iterator[tuple[Callable[..., Any], list[Any]]]:
    """The methods a decorator has marked, in the order they stand in the class."""
    seen: set[str] = set()
    for cls in type(instance).__mro__:
        for name, value in vars(cls).items():
            marks = getattr(value, "__dict__", {}).get(attribute)
            if marks and name not in seen:
                seen.add(name)
                yield getattr(instance, name), marks


def _in_order(requires: Mapping[str, Sequence[str]]) -> list[str]:
    try:
        return list(TopologicalSorter({n: list(r) for n, r in requires.items()}).static_order())
    except CycleError as exc:
        raise ConfigError([f"modules: {' -> '.join(exc.args[1])} require each other"]) from exc


def _bundled() -> list[str]:
    package = importlib.import_module(_BUNDLED)
    if getattr(package, "XMPPD_MODULES_API", None) != _API_NUMBER:
        raise XmppdError(f"the package {package.__name__!r} at {package.__file__} is not the one that belongs to xmppd")
    return _names_in(Path(package.__path__[0]))


def _names_in(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(
        entry.stem
        for entry in folder.iterdir()
        if not entry.name.startswith("_") and (entry.suffix == ".py" or (entry / "__init__.py").is_file())
    )


def _import_from(folder: Path, index: int, name: str) -> ModuleType | None:
    """A module of a site's own folder, under a private package name."""
    file = folder / f"{name}.py"
    package = folder / name / "__init__.py"
    path = file if file.is_file() else package if package.is_file() else None
    if path is None:
        return None
    full = f"{_PRIVATE}_{index}_{name}"
    if full in sys.modules:
        return sys.modules[full]
    locations = [str(path.parent)] if path is package else None
    spec = importlib.util.spec_from_file_location(full, path, submodule_search_locations=locations)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[full] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(full, None)
        raise
    return module


def _forget_code(python_name: str) -> dict[str, ModuleType]:
    """Make the next import read the files again; what is forgotten comes back."""
    root = python_name
    if python_name.startswith(f"{_BUNDLED}."):
        root = ".".join(python_name.split(".")[:2])
    known = [key for key in sys.modules if key == root or key.startswith(f"{root}.")]
    importlib.invalidate_caches()
    return {key: sys.modules.pop(key) for key in known}


def _restore_code(forgotten: Mapping[str, ModuleType]) -> None:
    sys.modules.update(forgotten)


async def _end_tasks(loaded: Loaded) -> None:
    """Returns when none is left, or after five seconds."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while loaded.tasks and (left := deadline - asyncio.get_running_loop().time()) > 0:
        for task in list(loaded.tasks):
            task.cancel()
        await asyncio.wait(list(loaded.tasks), timeout=left)
    for task in loaded.tasks:
        _log.error("task of a module does not end", module=loaded.name, task=task.get_name())


@contextmanager
def _named(name: str) -> Iterator[None]:
    """A module that cannot be started is the operator's to put right: name it."""
    try:
        yield
    except ConfigError:
        raise
    except XmppdError as exc:
        raise XmppdError(f"modules.{name}: {exc}") from exc
    except Exception as exc:
        _log.error("module cannot be started", module=name, exc=exc)
        raise ConfigError([f"modules.{name}: cannot be started: {type(exc).__name__}: {exc}"]) from exc
