"""Where the node is: options, environment, etc/xmppctl.cfg, two lines of xmppd.yml, defaults, in this order.

No YAML parser on the way to the socket: it would take longer than the command itself.
"""

import os

from xmppd.errors import CommandError

CTL_CONFIGS = ("etc/xmppctl.cfg", "/etc/xmppd/xmppctl.cfg")
CONFIGS = ("etc/xmppd.yml", "/etc/xmppd/xmppd.yml")
DEFAULT_NODE = "xmppd@localhost"
DEFAULT_DATA_DIR = "var"
USAGE = 2


class Settings:
    """What the options say, completed.

    config     the YAML file, or None: the server's defaults
    node       the name for messages; `node_given`: it was asked for, so the node that answers must bear it
    data_dir   the folder of xmppd.sock
    variables  everything that etc/xmppctl.cfg assigns; `start` puts it into the server's environment
    """

    def __init__(
        self,
        *,
        config: str | None = None,
        node: str | None = None,
        data_dir: str | None = None,
        ctl_config: str | None = None,
    ) -> None:
        path = ctl_config or os.environ.get("XMPPD_CTL_CONFIG") or _first(CTL_CONFIGS)
        self.variables = assignments(path) if path else {}
        self.config = config or self.variable("XMPPD_CONFIG") or _first(CONFIGS)
        self.given_node = node or self.variable("XMPPD_NODE")
        self.given_data_dir = data_dir or self.variable("XMPPD_DATA_DIR")
        scanned: dict[str, str] = {}
        if self.config and not (self.given_node and self.given_data_dir):
            scanned = top_level(self.config, ("node", "data_dir"))
        self.node = self.given_node or scanned.get("node") or DEFAULT_NODE
        self.data_dir = os.path.abspath(
            os.path.expanduser(self.given_data_dir or scanned.get("data_dir") or DEFAULT_DATA_DIR)
        )

    @property
    def socket(self) -> str:
        return f"{self.data_dir}/xmppd.sock"

    def variable(self, name: str) -> str | None:
        """A setting from the environment, else from etc/xmppctl.cfg."""
        return os.environ.get(name) or self.variables.get(name)


def _first(paths: tuple[str, ...]) -> str | None:
    for path in paths:
        if os.path.exists(path):
            return path
    return None


def _lines(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError as exc:
        raise CommandError(f"cannot read {path}: {exc.strerror}", USAGE) from exc
    except UnicodeDecodeError as exc:
        raise CommandError(f"cannot read {path}: not UTF-8", USAGE) from exc


def assignments(path: str) -> dict[str, str]:
    """The `NAME=value` lines of a file in the shell's spelling: quotes, comments and `export`, no expansions.

    Raises CommandError (usage) naming file and line for anything else.
    """
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        name, equals, value = text.removeprefix("export ").strip().partition("=")
        if not equals or not name.isidentifier():
            raise CommandError(f"{path}: line {number}: expected NAME=value, got {text!r}", USAGE)
        found[name] = _unquoted(value, f"{path}: line {number}")
    return found


def _unquoted(value: str, where: str) -> str:
    if not any(mark in value for mark in "\"'\\# \t$`"):
        return value
    import shlex

    try:
        words = shlex.split(value, comments=True)
    except ValueError as exc:
        raise CommandError(f"{where}: {str(exc).lower()}", USAGE) from exc
    if len(words) > 1:
        raise CommandError(f"{where}: a value with blanks needs quotes: {value!r}", USAGE)
    if words and ("$" in words[0] or "`" in words[0]) and not value.startswith("'"):
        raise CommandError(f"{where}: expansions are not carried out: {value!r}", USAGE)
    return words[0] if words else ""


def top_level(path: str, keys: tuple[str, ...]) -> dict[str, str]:
    """Plain values of top-level keys of a YAML file, without a YAML parser.

    Raises CommandError where a key is there in a spelling that takes one (anchors, blocks, a value on the next line).
    """
    found: dict[str, str] = {}
    for number, line in enumerate(_lines(path), 1):
        key, colon, value = line.partition(":")
        name = key.rstrip()
        if line[:1] in "\"'{":
            name = key.strip("\"'{ ")
        if not colon or name not in keys or (value and value[0] not in " \t"):
            continue
        value = value.strip()
        if value[:1] in ("'", '"'):
            end = value.find(value[0], 1)
            plain = value[1:end] if end > 0 else ""
            odd = end < 0 or "\\" in plain or value[end + 1 :].strip()[:1] not in ("", "#")
        else:
            plain = "" if value.startswith("#") else value.partition(" #")[0].rstrip()
            odd = plain[:1] in ("&", "*", "!", "|", ">", "{", "[")
        if odd or not plain or line[0] == "{":
            text = f"{path}: line {number}: write `{name}: VALUE` on one line, or say it with an option"
            raise CommandError(f"{text} (--node, --data-dir)", USAGE)
        found[name] = plain
    return found
