"""Logging: a fixed phrase, then `key=value`, one line per record.

    2026-11-21T09:00:00.123Z INFO  c2s[7f3a]   session bound jid=juliet@example.net/phone tls=1.3

`get_logger("c2s").bind("7f3a")` gives the logger of one stream. Everything goes through the standard library's logging,
so tests and libraries see ordinary records. Values come from clients: what could break or forge a line is escaped.
"""

import logging
import sys
import time
from collections.abc import Mapping
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Final, TextIO

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
_LONGEST: Final = 2000  # characters of one value; nobody fills the disk with one resource name

_level = "info"
_handler: logging.Handler | None = None


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
    text = str(value)
    if len(text) > _LONGEST:
        text = f"{text[:_LONGEST]}...({len(text)} characters)"
    if text and text.isprintable() and not any(char in text for char in " \"'=\\"):
        return text
    return '"' + escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


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
        second = int(record.created)
        if second != self._second:
            self._second, self._stamp = second, time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        if isinstance(record, Record):
            tag, message = record.tag, record.getMessage()
        else:  # a library's
            tag, message = record.name, escape(record.getMessage())
        label = _LABELS.get(record.levelno) or escape(record.levelname)
        milliseconds = int((record.created - second) * 1000)
        line = f"{self._stamp}.{milliseconds:03d}Z {label:5} {escape(tag):11} {message}"
        details = []
        if record.exc_info:
            details.append(self.formatException(record.exc_info))
        if record.stack_info:
            details.append(record.stack_info)
        for detail in details:
            line += "".join(f"\n  {escape(part)}" for part in detail.split("\n"))
        return line


class _Patient(logging.Handler):
    """A handler that counts what it could not write (a full disk, a closed pipe) and says so when it can again."""

    lost = 0

    def handleError(self, record: logging.LogRecord) -> None:
        """The server goes on without its log; nothing is printed elsewhere for each lost line."""
        self.lost += 1

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the record, and before it how many were lost."""
        if self.lost:
            count, self.lost = self.lost, 0
            note = Record("xmppd.log", logging.WARNING, "", 0, "log lines lost", None, None)
            note.tag, note.fields = "log", {"count": count}
            super().emit(note)
            if self.lost:  # still nothing
                self.lost += count
                return
        super().emit(record)


class _StreamHandler(_Patient, logging.StreamHandler[TextIO]):
    pass


class _FileHandler(_Patient, WatchedFileHandler):
    pass


def setup(level: str = "info", *, stream: TextIO | None = None, path: Path | None = None) -> None:
    """Sends everything that is logged to a file (reopened when it has been moved away) or a stream (default: stderr).

    May be called again; the former destination is closed. Raises OSError if the file cannot be opened, KeyError for a
    level that is none of LEVELS.
    """
    global _handler
    number = LEVELS[level]
    handler: logging.Handler
    if path is not None:
        handler = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
    else:
        handler = _StreamHandler(stream or sys.stderr)
    handler.setFormatter(Formatter())
    root = logging.getLogger()
    if _handler is not None:
        root.removeHandler(_handler)
        _handler.close()
    _handler = handler
    root.addHandler(handler)
    logging.addLevelName(NOTICE, "NOTICE")
    _apply(level, number)


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
