"""By which rules an answer of ours equals a recorded one; README.md says them in words."""

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FOLDER = HERE / "ejabberdctl-23.01"
DEVIATIONS: dict[str, dict[str, dict[str, Any]]] = json.loads((HERE / "deviations.json").read_text())

PLACEHOLDERS = {
    "{port}": r"\d+",
    "{uptime}": r"\d+",
    "{number}": r"\d+",
    "{id}": r"[^']+",
    "{time}": r"[^']+",
}
LISTS = ("connected_users", "connected_users_info", "user_sessions_info", "registered_users", "get_roster")


def files() -> list[dict[str, Any]]:
    """Every recorded command, in the order of the names."""
    return [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*.json"))]


def in_our_words(text: str, version: str) -> str:
    """Recorded output without Erlang's way to write values."""
    text = re.sub(r'^Error: error\nError: "(.*)"$', r"Error: \1", text, flags=re.M)
    text = text.replace("ejabberd 23.01-1 ", f"xmppd {version} ").replace("ejabberd node", "xmppd node")
    return text.replace("{wrapper_help}", "")


def expected(command: str, case: dict[str, Any], version: str) -> tuple[str, int]:
    """What we must print and the exit code."""
    ours = DEVIATIONS.get(command, {}).get(case["name"], {})
    stdout = ours.get("stdout", in_our_words(case["stdout"], version))
    code = ours.get("code", 2 if "' requires " in case["stdout"] else case["code"])
    return stdout, code


def check(command: str, case: dict[str, Any], stdout: str, code: int, *, node: str, version: str) -> None:
    """Assert that an answer is the recorded one."""
    want, want_code = expected(command, case, version)
    where = f"{command}: {case['name']}: {' '.join(case['argv'])}"
    assert code == want_code, f"{where}: exit code {code}, expected {want_code}; printed {stdout!r}"
    if "  Command Name: " in want:
        ours = DEVIATIONS.get(command, {}).get(case["name"], {})
        got_form, want_form = form(stdout), form(want)
        for part in ("arguments", "returns"):
            if part in ours:
                want_form[part] = ours[part]
        assert got_form == want_form, where
        return
    if matches := DEVIATIONS.get(command, {}).get(case["name"], {}).get("matches"):
        assert re.fullmatch(matches, stdout), f"{where}: printed {stdout!r}, expected {matches!r}"
        return
    got_lines, want_lines = stdout.split("\n"), want.split("\n")
    if case["argv"] and case["argv"][0] in LISTS and not want.startswith("Error: "):
        # ejabberd's order is that of its tables; what a placeholder stands for (a port) must not decide ours
        got_lines = in_order(got_lines, want_lines, node)
    assert len(got_lines) == len(want_lines), f"{where}: printed {stdout!r}, expected {want!r}"
    for got, wanted in zip(got_lines, want_lines, strict=True):
        assert re.fullmatch(pattern(wanted, node), got), f"{where}: printed {got!r}, expected {wanted!r}"


def in_order(lines: list[str], wanted: list[str], node: str) -> list[str]:
    """The lines in the order of the recorded ones that they equal; those that equal none stand at the end."""
    left, ordered = list(lines), []
    for each in wanted:
        found = next((line for line in left if re.fullmatch(pattern(each, node), line)), None)
        if found is not None:
            left.remove(found)
            ordered.append(found)
    return ordered + left


def pattern(text: str, node: str) -> str:
    """A regular expression for a text with placeholders."""
    parts = re.split(r"(\{[a-z_]+\})", text)
    return "".join(re.escape(node) if p == "{node}" else PLACEHOLDERS.get(p, re.escape(p)) for p in parts)


def form(text: str) -> dict[str, Any]:
    """The parts of a command's help that are not free words."""
    name = re.search(r"Command Name: (.*)", text)
    arguments = re.search(r"Arguments: (.*?)\n  Returns:", text, re.S)
    returns = re.search(r"Returns: (.*?)\n\n", text, re.S)
    assert None not in (name, arguments, returns), text
    last = text.rstrip("\n").rpartition("\n")[2]
    return {
        "name": name[1],
        "arguments": re.findall(r"(\w+)::\w+", arguments[1]),
        "returns": re.sub(r"::(atom|binary)\b", "::string", returns[1]),
        "error": last if last.startswith("Error: ") else "",
        "parts": [part for part in ("Tags: ", "Module: ", "Description: ") if part in text],
    }
