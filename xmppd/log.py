"""Logging: a fixed phrase, then `key=value`, one line per record.

    2026-11-21T09:00:00.123Z INFO  c2s[7f3a]   session bound jid=juliet@example.net/phone tls=1.3

As JSON (`log_format: json`) the same line is an object: `time`, `level`, `part`, `stream`, `phrase`, and each field.

`get_logger("c2s").bind("7f3a")` gives the logger of one stream. Everything goes through the standard library's logging,
so tests and libraries see ordinary records. Values come from clients: what could break or forge a line is escaped.
"""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TextIO

from xmppd.errors import ConfigError
from xmppd.log_limits import LogLimits

NOTICE: Final = 25
OFF: Final = 100

# ejabberd's words; what we log ourselves is never graver than critical.
LEVELS: Final[dict[str, int]] = {
    "none": OFF,
    "emergency": 70,
    "alert": 60,
    "critical": logging.CRITICAL,
    "error": logging.ERROR,
    "warning": logging.WARNING,
    "notice": NOTICE,
    "info": logging.INFO,
    "debug": logging.DEBUG,
}
_LABELS: Final = {70: "EMERG", 60: "ALERT", 50: "CRIT", 40: "ERROR", 30: "WARN", 25: "NOTE", 20: "INFO", 10: "DEBUG"}

# The roots of our own loggers. Libraries stay at warning: their debug lines hold statements with people's messages.
_OURS: Final = ("xmppd", "modules")
_WORDS: Final = {number: word for word, number in LEVELS.items()}
# What a line as JSON has of its own; no field may be called so.
RESERVED: Final = frozenset({"time", "level", "part", "stream", "phrase", "traceback"})
_LONGEST: Final = 2000  # characters of one value; nobody fills the disk with one resource name

_level = "info"
_handler: "_Handler | None" = None
_limits: LogLimits | None = None


def escape(text: str) -> str:
    """The text on one line: everything that is not printable is written as an escape."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else _code(char) for char in text)


_SHORT: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}


def _code(char: str) -> str:
    number = ord(char)
    if number < 256:
        return _SHORT.get(char) or f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 65536 else f"\\U{number:08x}"


def format_value(value: object) -> str:
    """A value as it stands behind `key=`: quoted when it holds blanks, quotes or anything that could forge a line."""
    if value is True or value is False:
        return "true" if value else "false"
    if value is None:
        return "none"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return format(value, ".6g")
    text = _cut(value)
    if text and text.isprintable() and not any(char in text for char in " \"'=\\"):
        return text
    return '"' + escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _cut(value: object) -> str:
    text = str(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}...({len(text)} characters)"


class Record(logging.LogRecord):
    """A record with a tag and fields of its own; the message is put together when a handler asks for it."""

    tag: str
    fields: Mapping[str, object]

    def getMessage(self) -> str:
        """The phrase and its fields on one line."""
        phrase = escape(str(self.msg))
        if not self.fields:
            return phrase
        return f"{phrase} {' '.join(f'{key}={format_value(value)}' for key, value in self.fields.items())}"


class Logger:
    """Speaks for one part of the server, or one stream of it. Costs one look-up when its level is off."""

    __slots__ = ("_logger", "tag")

    def __init__(self, logger: logging.Logger, tag: str) -> None:
        self._logger = logger
        self.tag = tag

    def bind(self, tag: str) -> "Logger":
        """The same logger for one stream: `c2s` bound to `7f3a` writes `c2s[7f3a]`."""
        return Logger(self._logger, f"{self.tag}[{tag}]")

    def wants(self, level: int) -> bool:
        """Whether a line of this level would be written; ask before computing something for it alone."""
        return self._logger.isEnabledFor(level)

    def debug(self, phrase: str, /, **fields: object) -> None:
        """What a developer wants to see; opening tags only, never bodies or secrets."""
        if self._logger.isEnabledFor(logging.DEBUG):
            self._emit(logging.DEBUG, phrase, fields)

    def info(self, phrase: str, /, **fields: object) -> None:
        """The operator's diary."""
        if self._logger.isEnabledFor(logging.INFO):
            self._emit(logging.INFO, phrase, fields)

    def notice(self, phrase: str, /, **fields: object) -> None:
        """Something an operator should know although nothing is wrong."""
        if self._logger.isEnabledFor(NOTICE):
            self._emit(NOTICE, phrase, fields)

    def warning(self, phrase: str, /, **fields: object) -> None:
        """Trouble we coped with."""
        if self._logger.isEnabledFor(logging.WARNING):
            self._emit(logging.WARNING, phrase, fields)

    def error(self, phrase: str, /, *, exc: BaseException | None = None, **fields: object) -> None:
        """Our bug, or lost data. With `exc` its traceback follows, indented."""
        if self._logger.isEnabledFor(logging.ERROR):
            self._emit(logging.ERROR, phrase, fields, exc)

    def critical(self, phrase: str, /, *, exc: BaseException | None = None, **fields: object) -> None:
        """The server cannot go on."""
        if self._logger.isEnabledFor(logging.CRITICAL):
            self._emit(logging.CRITICAL, phrase, fields, exc)

    def _emit(self, level: int, phrase: str, fields: Mapping[str, object], exc: BaseException | None = None) -> None:
        info = None if exc is None else (type(exc), exc, exc.__traceback__)
        # made here rather than by Logger.log: that would walk the stack for a file name nobody prints
        record = Record(self._logger.name, level, "", 0, phrase, None, info)
        record.tag = self.tag
        record.fields = fields
        self._logger.handle(record)


def get_logger(name: str) -> Logger:
    """The logger of a part: `get_logger("c2s")`, `get_logger("modules.mam")`, or `get_logger(__name__)`."""
    tag = name.removeprefix("xmppd.")
    ours = tag.partition(".")[0] in _OURS
    return Logger(logging.getLogger(tag if ours else f"xmppd.{tag}"), tag)


class Formatter(logging.Formatter):
    """Time in UTC, level, tag, message; a traceback follows indented, so that no line of it can pass for a record."""

    def __init__(self) -> None:
        super().__init__()
        self._second = -1
        self._stamp = ""

    def format(self, record: logging.LogRecord) -> str:
        """One line, and the lines of the traceback if there is one."""
        if isinstance(record, Record):
            tag, message = record.tag, record.getMessage()
        else:  # from logging itself: a library's, or one that was logged below this room
            tag, message = record.name.removeprefix("xmppd."), escape(record.getMessage())
        label = _LABELS.get(record.levelno) or escape(record.levelname)
        line = f"{self.stamp(record)} {label:5} {escape(tag):11} {message}"
        for detail in self.details(record):
            line += "".join(f"\n  {escape(part)}" for part in detail.split("\n"))
        return line

    def stamp(self, record: logging.LogRecord) -> str:
        """The record's time in UTC, with milliseconds."""
        second = int(record.created)
        if second != self._second:
            self._second, self._stamp = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._stamp}.{int((record.created - second) * 1000):03d}Z"

    def details(self, record: logging.LogRecord) -> list[str]:
        """Its traceback and its stack, where it has them."""
        details = [self.formatException(record.exc_info)] if record.exc_info else []
        return details + ([record.stack_info] if record.stack_info else [])


class JsonFormatter(Formatter):
    """One JSON object a line (JSON Lines). Numbers and booleans stay what they are, all else is a string."""

    def format(self, record: logging.LogRecord) -> str:
        """ASCII only, so that no shipper splits or refuses the line."""
        fields: Mapping[str, object] = {}
        if isinstance(record, Record):
            tag, phrase, fields = record.tag, str(record.msg), record.fields
        else:
            tag, phrase = record.name.removeprefix("xmppd."), record.getMessage()
        part, bracket, stream = tag.partition("[")
        line: dict[str, Any] = {
            "time": self.stamp(record),
            "level": _WORDS.get(record.levelno) or record.levelname.lower(),
            "part": _clean(part),
        }
        if bracket:
            line["stream"] = _clean(stream.removesuffix("]"))
        line["phrase"] = _clean(phrase)
        for key, value in fields.items():
            line[f"{key}_" if key in RESERVED else key] = _json_value(value)
        if details := self.details(record):
            line["traceback"] = _clean("\n".join(details))
        return json.dumps(line)


def _json_value(value: object) -> object:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return float(format(value, ".6g"))
    return _clean(_cut(value))


def _clean(text: str) -> str:
    # JSON could escape a lone surrogate, but parsers of other languages would refuse the line
    return text if text.isascii() else text.encode("utf-8", "backslashreplace").decode()


class _Handler(logging.Handler):
    """Counts what it could not write (a full disk, a closed pipe) and says so once it can again.

    The server goes on without its log, and nothing is printed elsewhere for each lost line.
    """

    lost = 0

    def write(self, text: str) -> None:
        """Writes whole lines; any exception means that they are lost."""
        raise NotImplementedError

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record, unless its phrase has been written too often."""
        limits = _limits
        if limits is None or not logging.DEBUG < record.levelno < logging.CRITICAL:
            self._say(record)
            return
        ours = isinstance(record, Record)
        if limits.admit(str(record.msg) if ours else f"{record.name} {record.levelname}"):
            self._say(record)
        if limits.due:
            self.sum_up()

    def sum_up(self, *, all: bool = False) -> None:
        """Says how many lines were left out."""
        for each in _limits.left_out(all=all) if _limits is not None else ():
            self._say(
                _note(logging.WARNING, "log lines left out", said=each.phrase, count=each.count, seconds=each.seconds)
            )

    def _say(self, record: logging.LogRecord) -> None:
        """Writes the record, and before it how many were lost."""
        try:
            text = self._format(record)
            if self.lost:
                text = f"{self.format(_note(logging.WARNING, 'log lines lost', count=self.lost))}\n{text}"
            self.write(f"{text}\n")
            self.lost = 0
        except Exception:
            self.lost += 1

    def _format(self, record: logging.LogRecord) -> str:
        try:
            return self.format(record)
        except Exception as exc:  # a value that cannot be turned into text, a library's wrong format string
            fault = _note(logging.ERROR, "log line failed", logger=record.name, said=str(record.msg), error=repr(exc))
            return self.format(fault)

    def reopen(self) -> None:
        """Begin to write to whatever has the file's name now; OSError when that is not possible."""


def _note(level: int, phrase: str, /, **fields: object) -> Record:
    record = Record("xmppd.log", level, "", 0, phrase, None, None)
    record.tag, record.fields = "log", fields
    return record


class _StreamHandler(_Handler):
    def __init__(self, stream: TextIO) -> None:
        super().__init__()
        self._stream = stream

    def write(self, text: str) -> None:
        self._stream.write(text.encode("utf-8", "backslashreplace").decode())
        self._stream.flush()


class _FileHandler(_Handler):
    """Appends to a file, unbuffered; when it has been moved away (logrotate) the next line starts a new one."""

    def __init__(self, path: Path) -> None:
        self._path = path.absolute()
        self._file, self._identity = self._open()
        super().__init__()  # not before: logging closes at exit whatever has come so far
        self._torn = False  # the last write ended inside a line

    def _open(self) -> tuple[int, tuple[int, int]]:
        file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        status = os.fstat(file)
        return file, (status.st_dev, status.st_ino)

    def write(self, text: str) -> None:
        try:
            status = os.stat(self._path)
            moved = (status.st_dev, status.st_ino) != self._identity
        except FileNotFoundError:
            moved = True
        if moved:
            self.reopen()
        data = ("\n" if self._torn else "").encode() + text.encode("utf-8", "backslashreplace")
        while data:
            written = os.write(self._file, data)
            self._torn = written < len(data)
            data = data[written:]

    def reopen(self) -> None:
        """The former file goes on to be written to when the new one cannot be opened."""
        former = self._file
        self._file, self._identity = self._open()
        self._torn = False
        os.close(former)

    def close(self) -> None:
        """Closes the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        super().close()


def setup(
    level: str = "info",
    *,
    stream: TextIO | None = None,
    path: Path | None = None,
    format: Literal["text", "json"] = "text",
) -> None:
    """Sends everything that is logged to a file (reopened when it has been moved away) or a stream (default: stderr).

    May be called again; the former destination is closed once the new one is open. Raises OSError if the file cannot
    be opened, KeyError for a level that is none of LEVELS.
    """
    global _handler
    number = LEVELS[level]
    handler: _Handler = _FileHandler(path) if path is not None else _StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonFormatter() if format == "json" else Formatter())
    root = logging.getLogger()
    if _handler is not None:
        root.removeHandler(_handler)
        _handler.close()
    _handler = handler
    root.addHandler(handler)
    logging.addLevelName(NOTICE, "NOTICE")
    _apply(level, number)


class Settings(Protocol):
    """The options of the configuration that are about the log."""

    @property
    def loglevel(self) -> str: ...
    @property
    def log_file(self) -> Path | None: ...
    @property
    def log_format(self) -> Literal["text", "json"]: ...
    @property
    def log_burst_limit_count(self) -> int: ...
    @property
    def log_burst_limit_window_time(self) -> float: ...


def setup_from(settings: Settings) -> None:
    """`setup` as the configuration says; ConfigError when the file cannot be opened: nothing has changed then."""
    try:
        setup(settings.loglevel, path=settings.log_file, format=settings.log_format)
    except OSError as exc:
        raise ConfigError([f"log_file: cannot write {settings.log_file}: {exc.strerror}"]) from exc
    limit(settings.log_burst_limit_count, settings.log_burst_limit_window_time)


def reopen() -> None:
    """Closes the log file and opens the one that has its name now; nothing where the log is a stream. Raises OSError.

    A file that was moved away is noticed without this, at the next line. This is for what cannot be seen so, and for
    those who want to be sure that nobody holds the old file any more.
    """
    if _handler is not None:
        _handler.acquire()
        try:
            _handler.reopen()
        finally:
            _handler.release()


def limit(count: int, window: float) -> None:
    """From now on so many lines of each phrase in so many seconds; those of `debug` and `critical` are not counted."""
    global _limits
    if _limits is None or (_limits.count, _limits.window) != (count, window):
        sum_up(all=True)
        _limits = LogLimits(count, window)


def sum_up(*, all: bool = False) -> None:
    """Say how many lines were left out: a window after the first of them, or all of it. To be called now and then."""
    if _handler is not None and _limits is not None and (all or _limits.due):
        _handler.acquire()
        try:
            _handler.sum_up(all=all)
        finally:
            _handler.release()


def set_level(level: str) -> None:
    """Changes the level while running; KeyError for a word that is none of LEVELS."""
    _apply(level, LEVELS[level])


def get_level() -> str:
    """The level in ejabberd's words."""
    return _level


def _apply(level: str, number: int) -> None:
    global _level
    _level = level
    logging.getLogger().setLevel(max(number, logging.WARNING))
    for name in _OURS:
        logging.getLogger(name).setLevel(number)
