"""The operator's `database.url`, taken apart: which database, where, and how it must be secured."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from xmppd.config.types import each_server
from xmppd.errors import ConfigError

TlsMode = Literal["off", "required", "verify-ca", "verify-full"]

_MYSQL_OPTIONS: Final = ("ssl", "ssl_ca", "ssl_cert", "ssl_key", "unix_socket")
_TLS_WORDS: Final[dict[str, TlsMode]] = {
    "off": "off",
    "false": "off",
    "0": "off",
    "required": "required",
    "true": "required",
    "1": "required",
    "verify-ca": "verify-ca",
    "verify-full": "verify-full",
}


@dataclass(frozen=True, slots=True)
class SqliteTarget:
    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def __str__(self) -> str:
        return f"sqlite {self.path}"


@dataclass(frozen=True, slots=True)
class MysqlTarget:
    """`tls`: off; required = encrypted, whatever the certificate; verify-ca; verify-full = its host name too."""

    host: str
    port: int
    database: str
    user: str
    password: str = field(repr=False)
    unix_socket: str | None = None
    tls: TlsMode = "off"
    ssl_ca: str | None = None
    ssl_cert: str | None = None
    ssl_key: str | None = None

    @property
    def name(self) -> str:
        """The server in words: `db1:3306`."""
        return self.unix_socket or f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"mysql {self.name}/{self.database}"

    def ssl_context(self) -> ssl.SSLContext | None:
        """Raises ConfigError when a certificate file cannot be used."""
        if self.tls == "off":
            return None
        try:
            context = ssl.create_default_context(cafile=self.ssl_ca)
            if self.ssl_cert:
                context.load_cert_chain(self.ssl_cert, self.ssl_key)
        except OSError as exc:
            raise ConfigError([f"database.url: the TLS files cannot be used: {exc}"]) from exc
        context.check_hostname = self.tls == "verify-full"
        context.verify_mode = ssl.CERT_NONE if self.tls == "required" else ssl.CERT_REQUIRED
        return context


Target = SqliteTarget | MysqlTarget


def parse_url(url: str, data_dir: Path) -> tuple[Target, ...]:
    """`sqlite:///FILE` or `mysql://USER:PASSWORD@HOST:PORT,HOST:PORT/NAME?ssl=required`, of which every host is a
    server of its own; `{data_dir}` stands for the data folder.

    Raises ConfigError; its text never holds the URL, which has a password in it.
    """
    if url.startswith("sqlite:"):
        return (_sqlite(url.replace("{data_dir}", str(data_dir))),)
    if url.startswith(("mysql:", "mariadb:")):
        return tuple(_mysql(each) for each in each_server(url))
    raise ConfigError(["database.url: expected sqlite:///FILE or mysql://USER:PASSWORD@HOST:PORT/NAME"])


def _sqlite(url: str) -> SqliteTarget:
    prefix = "sqlite:///"
    name = url.removeprefix(prefix)
    if not url.startswith(prefix) or not name or name == ":memory:" or "?" in name:
        raise ConfigError(["database.url: expected sqlite:///FILE (a file on this machine, no options)"])
    return SqliteTarget(Path(name))


def _mysql(url: str) -> MysqlTarget:
    try:
        parts = urlsplit(url)
        port = parts.port or 3306
    except ValueError:
        raise ConfigError(["database.url: expected a port from 1 to 65535 after the host"]) from None
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    problems = [
        f"database.url: unknown option {name}; there are {', '.join(_MYSQL_OPTIONS)}"
        for name in options
        if name not in _MYSQL_OPTIONS
    ]
    database = unquote(parts.path.lstrip("/"))
    if not database or "/" in database:
        problems.append("database.url: expected the name of one database after the host: mysql://…@HOST/NAME")
    if not parts.username:
        problems.append("database.url: expected a user before the host: mysql://USER:PASSWORD@HOST/NAME")
    tls = _TLS_WORDS.get(options.get("ssl", "off"))
    if tls is None:
        problems.append("database.url: ssl: expected off, required, verify-ca or verify-full")
    elif tls == "off" and any(name.startswith("ssl_") for name in options):
        problems.append(
            "database.url: ssl_ca, ssl_cert and ssl_key do nothing without ssl=required, verify-ca or verify-full"
        )
    if problems:
        raise ConfigError(problems)
    return MysqlTarget(
        host=parts.hostname or "localhost",
        port=port,
        database=database,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        unix_socket=options.get("unix_socket"),
        tls=tls or "off",
        ssl_ca=options.get("ssl_ca"),
        ssl_cert=options.get("ssl_cert"),
        ssl_key=options.get("ssl_key"),
    )
