"""Log lines: their shape, their levels, and that nobody can forge one."""

import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmppd import log


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    names = ("", "xmppd", "modules")
    levels = {name: logging.getLogger(name).level for name in names}
    yield
    if log._handler is not None:
        logging.getLogger().removeHandler(log._handler)
        log._handler.close()
        log._handler = None
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def lines() -> io.StringIO:
    stream = io.StringIO()
    log.setup("debug", stream=stream)
    return stream


LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (\S+) +(\S+) +(.*)")


def test_a_line_is_a_phrase_and_its_values(lines: io.StringIO) -> None:
    stream = log.get_logger("c2s").bind("7f3a")

    stream.info("session bound", jid="juliet@example.net/phone", tls=1.3, resumed=False, silent_s=6, host=None)

    text = lines.getvalue()
    assert re.match(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z INFO  c2s\[7f3a\]   session bound ", text)
    assert text.endswith(" session bound jid=juliet@example.net/phone tls=1.3 resumed=false silent_s=6 host=none\n")


def test_time_is_utc_with_milliseconds() -> None:
    record = logging.LogRecord("xmppd.x", logging.INFO, "", 0, "hello", None, None)
    record.created = 1795251600.1239

    assert log.Formatter().format(record) == "2026-11-21T09:00:00.123Z INFO  x           hello"


@pytest.mark.parametrize(
    ("level", "label"),
    [
        *(("debug", "DEBUG"), ("info", "INFO"), ("notice", "NOTE"), ("warning", "WARN")),
        *(("error", "ERROR"), ("critical", "CRIT")),
    ],
)
def test_each_level_has_its_word(lines: io.StringIO, level: str, label: str) -> None:
    getattr(log.get_logger("cluster"), level)("peer lost", node="xmppd@node02")

    match = LINE.fullmatch(lines.getvalue().rstrip("\n"))
    assert match is not None
    assert match.groups() == (label, "cluster", "peer lost node=xmppd@node02")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("two words", '"two words"'),
        ("", '""'),
        ('say "hi"', r'"say \"hi\""'),
        ("it's", '"it\'s"'),
        ("back\\slash", r'"back\\slash"'),
        ("a=b", '"a=b"'),
        ("a\nb\r\t\x1b[2J\x85\u2028", r'"a\nb\r\t\x1b[2J\x85\u2028"'),
        ("\u202egnp.exe", r'"\u202egnp.exe"'),
        ("\ud800", r'"\ud800"'),
        ("müller", "müller"),
        (["a", "b"], "\"['a', 'b']\""),
        (0.1 + 0.2, "0.3"),
    ],
)
def test_a_value_that_could_be_misread_is_quoted(value: object, text: str) -> None:
    assert log.format_value(value) == text


def test_a_client_cannot_forge_a_line(lines: io.StringIO) -> None:
    evil = "x\n2026-11-21T09:00:00.123Z INFO  c2s[0001]   session bound jid=admin@example.net"

    log.get_logger("c2s").warning("login failed", user=evil)
    log.get_logger("c2s").bind(evil).debug(f"> <message id='{evil}'>")
    logging.getLogger("somelibrary").warning("bad peer %s", evil)

    assert lines.getvalue().count("\n") == 3
    assert all(LINE.fullmatch(line) for line in lines.getvalue().splitlines())


@given(st.text(), st.text())
def test_whatever_the_values_are_it_is_one_line_that_can_be_taken_apart(phrase: str, value: str) -> None:
    record = log.Record("xmppd.x", logging.INFO, "", 0, phrase, None, None)
    record.tag, record.fields = "x", {"first": value, "last": 1}

    line = log.Formatter().format(record)

    assert line.isprintable()
    assert line.endswith(f" first={log.format_value(value)} last=1")
    quoted = re.fullmatch(r'"((?:[^"\\]|\\.)*)"|[^\s"\'=\\]+', log.format_value(value))
    assert quoted is not None


def test_a_huge_value_is_cut(lines: io.StringIO) -> None:
    log.get_logger("c2s").info("stream error", text="x" * 1_000_000)

    assert len(lines.getvalue()) < 3000
    assert "...(1000000 characters)" in lines.getvalue()


def test_a_traceback_follows_indented_so_that_it_forges_nothing(lines: io.StringIO) -> None:
    try:
        raise ValueError("boom\n2026-11-21T09:00:00.123Z INFO  forged\x1b[2J")
    except ValueError as exc:
        log.get_logger("modules.mam").error("hook failed", exc=exc, event="message_routed")

    first, *rest = lines.getvalue().rstrip("\n").split("\n")
    match = LINE.fullmatch(first)
    assert match is not None
    assert match.groups() == ("ERROR", "modules.mam", "hook failed event=message_routed")
    assert rest[0] == "  Traceback (most recent call last):"
    assert rest[-2:] == ["  ValueError: boom", r"  2026-11-21T09:00:00.123Z INFO  forged\x1b[2J"]
    assert all(line.startswith("  ") and line.isprintable() for line in rest)


def test_levels_are_changed_while_running(lines: io.StringIO) -> None:
    logger = log.get_logger("c2s")
    plugin = log.get_logger("modules.mam")

    log.set_level("warning")
    logger.info("unheard")
    plugin.info("unheard")
    assert not logger.wants(logging.INFO)
    assert log.get_level() == "warning"

    log.set_level("debug")
    logger.debug("heard")
    plugin.debug("heard")
    log.set_level("none")
    logger.critical("unheard")

    assert [LINE.fullmatch(line).group(2) for line in lines.getvalue().splitlines()] == ["c2s", "modules.mam"]  # type: ignore[union-attr]
    with pytest.raises(KeyError):
        log.set_level("verbose")
    assert log.get_level() == "none"


@pytest.mark.parametrize("level", log.LEVELS)
def test_every_word_of_the_configuration_is_a_level(level: str) -> None:
    from typing import get_args

    from xmppd.config.schema import LogLevel

    log.set_level(level)
    assert log.get_level() == level
    assert set(log.LEVELS) == set(get_args(LogLevel))


def test_libraries_never_speak_below_warning(lines: io.StringIO) -> None:
    logging.getLogger("aiosqlite").debug("INSERT ... (a private message)")
    assert lines.getvalue() == ""


def test_nothing_is_formatted_when_the_level_is_off(lines: io.StringIO) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("formatted")

    log.set_level("error")
    log.get_logger("c2s").debug("stanza", stanza=Costly())

    assert lines.getvalue() == ""


def test_a_logger_is_named_once_by_module_or_by_part(lines: io.StringIO) -> None:
    log.get_logger("xmppd.c2s").info("one")
    log.get_logger("c2s").info("two")
    logging.getLogger("xmppd.hooks").warning("three %s", 3)

    found = [LINE.fullmatch(line) for line in lines.getvalue().splitlines()]
    assert [(match[2], match[3]) for match in found if match] == [("c2s", "one"), ("c2s", "two"), ("hooks", "three 3")]


def test_tests_see_phrase_and_values(caplog: pytest.LogCaptureFixture) -> None:
    log.set_level("info")
    log.get_logger("c2s").info("session bound", jid="juliet@example.net")
    assert caplog.messages == ["session bound jid=juliet@example.net"]


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "xmppd.log"
    log.setup("info", path=path)
    log.get_logger("c2s").info("one")
    path.rename(tmp_path / "xmppd.log.1")
    log.get_logger("c2s").info("two")

    assert "one" in (tmp_path / "xmppd.log.1").read_text()
    assert "two" in path.read_text()
    assert "one" not in path.read_text()


def test_setting_up_again_moves_to_the_new_place(tmp_path: Path, lines: io.StringIO) -> None:
    log.setup("info", path=tmp_path / "xmppd.log")
    log.get_logger("c2s").info("one")

    assert lines.getvalue() == ""
    assert (tmp_path / "xmppd.log").read_text().count("one") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_survived_and_said_afterwards(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "xmppd.log"
    log.setup("info", path=path)
    path.unlink()
    path.symlink_to("/dev/full")
    logger = log.get_logger("c2s")
    logger.info("one")
    logger.info("two")
    path.unlink()
    logger.info("three")

    tail = [line.split("Z ", 1)[1].split() for line in path.read_text().splitlines()]
    assert tail == [["WARN", "log", "log", "lines", "lost", "count=2"], ["INFO", "c2s", "three"]]
    assert capsys.readouterr() == ("", "")


def test_a_value_that_cannot_be_text_is_said_and_harms_nobody(lines: io.StringIO) -> None:
    class Broken:
        def __str__(self) -> str:
            raise RuntimeError("no text")

    record = log.Record("xmppd.c2s", logging.INFO, "", 0, "stream opened", None, None)
    record.tag, record.fields = "c2s", {"peer": Broken()}
    assert log._handler is not None
    log._handler.handle(record)  # not through the logger: pytest's own handler would raise
    log._handler.handle(logging.LogRecord("somelibrary", logging.WARNING, "", 0, "%d peers", ("two",), None))

    first, second = (LINE.fullmatch(line) for line in lines.getvalue().splitlines())
    assert first is not None
    assert second is not None
    assert first[3].startswith('log line failed logger=xmppd.c2s said="stream opened" error=')
    assert second[3].startswith('log line failed logger=somelibrary said="%d peers" error=')


def test_a_closed_stream_is_survived(lines: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    lines.close()
    log.get_logger("c2s").info("one")
    assert capsys.readouterr() == ("", "")


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup("info")
    log.get_logger("c2s").info("one")
    assert "one" in capsys.readouterr().err


# -- JSON


@pytest.fixture
def json_lines() -> io.StringIO:
    stream = io.StringIO()
    log.setup("debug", stream=stream, format="json")
    return stream


def test_a_json_line_has_the_fields_of_the_text(json_lines: io.StringIO) -> None:
    log.get_logger("c2s").bind("7f3a").info(
        "session bound", jid="juliet@example.net/phone", tls=1.3, resumed=False, silent_s=6, host=None
    )

    line = json.loads(json_lines.getvalue())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line == {
        "level": "info",
        "part": "c2s",
        "stream": "7f3a",
        "phrase": "session bound",
        "jid": "juliet@example.net/phone",
        "tls": 1.3,
        "resumed": False,
        "silent_s": 6,
        "host": None,
    }


@given(st.text(), st.text(), st.floats())
def test_whatever_the_values_are_it_is_one_json_line(phrase: str, value: str, number: float) -> None:
    record = log.Record("xmppd.x", logging.INFO, "", 0, phrase, None, None)
    record.tag, record.fields = f"x[{value}]", {"first": value, "number": number, "last": 1}

    line = log.JsonFormatter().format(record)

    assert line.isascii()
    assert "\n" not in line
    read = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert read["last"] == 1
    assert not re.search("[\ud800-\udfff]", read["first"] + read["phrase"])
    if value.isascii() and len(value) < 2000:
        assert read["first"] == value


def test_a_traceback_is_part_of_its_json_line(json_lines: io.StringIO) -> None:
    try:
        raise ValueError("rose\nthorn")
    except ValueError as exc:
        log.get_logger("xmppd.hooks").error("hook failed", exc=exc)

    line = json.loads(json_lines.getvalue())
    assert line["level"] == "error"
    assert line["traceback"].endswith("ValueError: rose\nthorn")


def test_a_field_cannot_take_the_place_of_the_lines_own(json_lines: io.StringIO) -> None:
    log.get_logger("c2s").info("one", level="none", time=5)

    line = json.loads(json_lines.getvalue())
    assert (line["level"], line["level_"], line["time_"]) == ("info", "none", 5)


def test_a_librarys_line_is_json_too(json_lines: io.StringIO) -> None:
    logging.getLogger("somelibrary").warning("%d peers", 2)

    line = json.loads(json_lines.getvalue())
    assert (line["part"], line["level"], line["phrase"]) == ("somelibrary", "warning", "2 peers")


# -- reopening


def test_a_reopened_log_goes_to_the_file_of_that_name(tmp_path: Path) -> None:
    path = tmp_path / "xmppd.log"
    log.setup(path=path)
    before = {file.name for file in Path("/proc/self/fd").iterdir()}
    log.get_logger("c2s").info("one")
    path.rename(tmp_path / "xmppd.log.1")

    log.reopen()

    assert path.read_text() == ""
    log.get_logger("c2s").info("two")
    assert "one" in (tmp_path / "xmppd.log.1").read_text()
    assert "two" in path.read_text()
    assert len({file.name for file in Path("/proc/self/fd").iterdir()}) == len(before)


def test_a_log_that_cannot_be_reopened_goes_on_in_the_old_file(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    folder.mkdir()
    log.setup(path=folder / "xmppd.log")
    folder.rename(tmp_path / "elsewhere")

    with pytest.raises(OSError, match="No such file"):
        log.reopen()

    (tmp_path / "elsewhere").rename(folder)
    log.get_logger("c2s").info("two")
    assert "two" in (folder / "xmppd.log").read_text()


def test_a_file_that_could_not_be_opened_is_not_closed_at_exit(tmp_path: Path) -> None:
    before = len(logging._handlerList)

    with pytest.raises(FileNotFoundError) as kept:  # as a reload keeps it, for its report
        log.setup(path=tmp_path / "missing" / "xmppd.log")

    assert len(logging._handlerList) == before
    assert kept.value.filename


def test_a_stream_has_nothing_to_reopen(lines: io.StringIO) -> None:
    log.reopen()
    log.get_logger("c2s").info("one")
    assert "one" in lines.getvalue()
