"""One request of an operator, carried out into frames: for the control socket, and for other nodes that pass one on.

    {"argv": ["register", "juliet", "localhost", "-"], "json": false, "secret": null, "local": false}

Instead of `argv` there may be `command` and `args`, an object of JSON values by name. With `finite` an answer without
an end is refused. The frames that come back stand
in socket.py.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any, Final

from xmppd.admin.registry import Call, Caller, Registry, UsageError
from xmppd.admin.results import Result, error_json
from xmppd.errors import CommandError
from xmppd.log import get_logger

log = get_logger("admin")

Frame = dict[str, Any]
Send = Callable[[Frame], Awaitable[None]]
Ask = Callable[[str], Awaitable[str | None]]  # the secret argument of this name, None where there is none
Endless = Callable[[], AbstractAsyncContextManager[None]]

MAX_OUT: Final = 1 << 20  # characters in one `out`


async def answer(
    registry: Registry, frame: Frame, caller: Caller, send: Send, ask: Ask, endless: Endless = nullcontext
) -> None:
    """Carry a request out. What `send` and `ask` raise passes through; refusals are told as the last frame. An answer
    without an end is given inside `endless()`, which may break it off."""
    as_json = frame.get("json") is True
    try:
        await _run(registry, frame, caller, send, ask, endless)
    except CommandError as exc:
        await send(refusal(exc, as_json))


def refusal(exc: CommandError, as_json: bool) -> Frame:
    """The last frame of a request that was refused."""
    if as_json:
        out = error_json(exc.text, exc.code)
    else:
        help = f"{exc.help}\n" if isinstance(exc, UsageError) and exc.help else ""
        out = f"{help}Error: {exc.text}\n"
    return {"out": out, "err": "", "code": exc.code}


async def _run(registry: Registry, frame: Frame, caller: Caller, send: Send, ask: Ask, endless: Endless) -> None:
    as_json = frame.get("json") is True

    async def progress(text: str) -> None:
        await send({"progress": text})

    name, args = await _wanted(registry, frame, ask)
    patient = frame.get("finite") is not True
    call = Call(caller, local=frame.get("local") is True, patient=patient, progress=progress)
    result = await registry.call(name, args, caller=caller, call=call)
    if result.live:
        async with endless(), aclosing(result.value) as elements:
            async for element in elements:
                # None: nothing happened for a while, a sign of life
                await send({"out": "" if element is None else result.one(element, as_json=as_json)})
    else:
        parts = result.json_chunks() if as_json else result.chunks()
        while part := _next(parts, name):
            for start in range(0, len(part), MAX_OUT):
                await send({"out": part[start : start + MAX_OUT]})
            await asyncio.sleep(0)  # other streams want their turn while a long list is printed
    await send(_last(result))


def _last(result: Result) -> Frame:
    return {"out": "", "err": "".join(f"{note}\n" for note in result.notes), "code": result.code}


async def _wanted(registry: Registry, frame: Frame, ask: Ask) -> tuple[str, list[str] | Mapping[str, Any]]:
    args = frame.get("args")
    if isinstance(args, Mapping):
        return registry.get(str(frame.get("command"))).name, args
    argv = frame.get("argv")
    if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
        raise UsageError("argv: expected a list of texts")
    spec, rest = registry.split(argv)
    return spec.name, await _with_secret(spec, list(rest), frame.get("secret"), ask)


async def _with_secret(spec: Any, args: list[str], secret: object, ask: Ask) -> list[str]:
    places = [place for place, arg in enumerate(spec.args) if arg.secret]
    if (
        isinstance(secret, str)
        and places
        and len(args) == len(spec.args) - 1
        and args[places[0] : places[0] + 1] != ["-"]
    ):
        args.insert(places[0], secret)
        return args
    for place in places:
        if place < len(args) and args[place] != "-" and spec.args[place].never_argv:
            name = spec.args[place].name
            raise UsageError(f"the {name} is never given on the command line, where `ps` shows it: write - and type it")
        if place >= len(args) or args[place] != "-":
            continue
        if not isinstance(secret, str):
            secret = await ask(spec.args[place].name)
        if not isinstance(secret, str):
            raise UsageError(f"no {spec.args[place].name} was given")
        args[place] = secret
    return args


def _next(parts: Iterator[str], command: str) -> str:
    """The next piece of an output, "" at its end; lists are walked here, so what fails in a handler's may fail now."""
    try:
        return next(parts, "")
    except Exception as exc:
        log.error("command failed", exc=exc, command=command)
        raise CommandError(f"the command '{command}' failed ({type(exc).__name__}), see the log") from exc
