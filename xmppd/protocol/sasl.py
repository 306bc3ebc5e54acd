"""SASL on the server's side (RFC 6120 section 6): SCRAM with and without channel binding (RFC 5802, 7677), PLAIN
(RFC 4616) and ANONYMOUS (RFC 4505), without any I/O.

An `Exchange` is one attempt. It never loads or computes anything slow itself: it returns a step that says what it needs
next (`NeedsSecret`, `NeedsVerify`), and whoever drives it brings that and goes on.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from scramp import ScramException, ScramMechanism  # type: ignore[import-untyped]
from scramp.core import Gs2Header, ScramServer  # type: ignore[import-untyped]
from scramp.utils import ServerError  # type: ignore[import-untyped]
from scramp.utils import saslprep as _saslprep

from xmppd.errors import JidError, XmppdError
from xmppd.protocol.jid import parse, prepare_local

CONDITIONS: Final = frozenset(  # RFC 6120 6.5
    {
        "aborted",
        "account-disabled",
        "credentials-expired",
        "encryption-required",
        "incorrect-encoding",
        "invalid-authzid",
        "invalid-mechanism",
        "malformed-request",
        "mechanism-too-weak",
        "not-authorized",
        "temporary-auth-failure",
    }
)
MECHANISMS: Final = {"sha512": "SCRAM-SHA-512", "sha256": "SCRAM-SHA-256", "sha1": "SCRAM-SHA-1"}  # strongest first
PLUS: Final = "-PLUS"  # behind the name of a mechanism: with channel binding
KINDS: Final = tuple(MECHANISMS)
_KIND_OF: Final = {name: kind for kind, name in MECHANISMS.items()}
_DIGEST_SIZE: Final = {kind: hashlib.new(kind).digest_size for kind in KINDS}

MIN_ITERATIONS: Final = 4096  # RFC 5802 5.1
MAX_ITERATIONS: Final = 10_000_000  # a client would give up long before
SALT_SIZE: Final = 16
MIN_SALT_SIZE: Final = 12
MAX_PASSWORD: Final = 1024  # bytes of UTF-8, before SASLprep
MAX_USERNAME: Final = 1023  # bytes of UTF-8 (RFC 7622 3.3)
MAX_NONCE: Final = 512  # characters; clients send 16 to 64
MAX_TRACE: Final = 255  # characters of what an anonymous client says about itself (RFC 4505 section 2)
MAX_MESSAGE: Final = 8192  # bytes: the longest PLAIN response (two JIDs and a password) fits

_GS2: Final = re.compile(r"(?P<flag>[yn]|p=[A-Za-z0-9.-]+),(?:a=(?P<authzid>[^,\0]+))?,(?P<bare>.*)", re.DOTALL)
_BARE: Final = re.compile(
    rf"n=(?P<username>[^,\0]+),r=(?P<nonce>[\x21-\x2b\x2d-\x7e]{{1,{MAX_NONCE}}})(?:,[A-Za-z]=[^,\0]+)*"
)
_BAD_ESCAPE: Final = re.compile(r"=(?!2C|3D)")


class SaslError(XmppdError):
    """The attempt failed: a condition of RFC 6120 6.5 and a text for humans. The exchange is over."""

    def __init__(self, condition: str, text: str = "") -> None:
        if condition not in CONDITIONS:
            raise ValueError(f"{condition!r} is no SASL error condition")
        super().__init__(f"{condition}: {text}" if text else condition)
        self.condition = condition
        self.text = text


class PasswordError(XmppdError):
    """A password that cannot be an account's: empty, too long, or with characters SASLprep (RFC 4013) forbids."""


@dataclass(frozen=True, slots=True)
class Secret:
    """What is stored instead of a password (RFC 5802 section 3). `kind` is `sha1`, `sha256` or `sha512`."""

    kind: str
    salt: bytes = field(repr=False)
    iterations: int
    stored_key: bytes = field(repr=False)
    server_key: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Challenge:
    """Send `data` to the client (base64 in `<challenge/>`) and wait for its response."""

    data: bytes


@dataclass(frozen=True, slots=True)
class NeedsSecret:
    """Load the secret of that kind, or a `fake_secret`, and `supply` it. `username` is prepared."""

    username: str
    kind: str


@dataclass(frozen=True, slots=True)
class NeedsVerify:
    """Check the password away from the event loop and say what came of it with `verified`."""

    username: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Success:
    """The client is `username`; `data` goes into `<success/>` (base64; empty for PLAIN and ANONYMOUS).

    `anonymous`: it is nobody we know; the account is made for this login and ends with its session.
    """

    username: str
    data: bytes
    anonymous: bool = False


Step = Challenge | NeedsSecret | NeedsVerify | Success


def saslprep(text: str) -> str:
    """SASLprep for stored strings (RFC 4013): unassigned code points are forbidden. Raises `ValueError`."""
    if text.isascii() and text.isprintable():  # nothing of it changes or is forbidden, and the rest is slow
        return text
    try:
        prepared: str = _saslprep(text)
    except ScramException as exc:
        raise ValueError(exc.args[0]) from exc
    return prepared


def prep_username(text: str) -> str:
    """A SASL user name as the local part of an address: SASLprep, then nodeprep. Raises `JidError`.

    Nobody's name is one that would be another as an address alone: their tables differ in a few characters (U+2F868).
    """
    try:
        prepared = prepare_local(saslprep(text))
    except ValueError as exc:
        raise JidError(f"{text[:80]!r} is no local part of an address: {exc}") from exc
    if not text.isascii() and prepare_local(text) != prepared:
        raise JidError(f"{text[:80]!r} is one name in a login and another in an address")
    return prepared


def prep_password(password: str) -> bytes:
    """The octets that are hashed: SASLprep and UTF-8. Raises `PasswordError`."""
    try:
        if len(password.encode()) > MAX_PASSWORD:
            raise PasswordError(f"a password may have at most {MAX_PASSWORD} bytes")
        prepared = saslprep(password).encode()
    except ValueError as exc:  # lone surrogates, too: an argument that was no UTF-8
        raise PasswordError("the password has characters that SASLprep (RFC 4013) forbids") from exc
    if not prepared:
        raise PasswordError("the password is empty")
    return prepared


def derive(kind: str, password: str, *, salt: bytes | None = None, iterations: int) -> Secret:
    """The secret to store for a password: one PBKDF2, milliseconds, so not on the event loop.

    Raises `PasswordError`; `ValueError` for an unknown kind, or a salt or count that no client would accept.
    """
    if salt is None:
        salt = secrets.token_bytes(SALT_SIZE)
    if kind not in MECHANISMS or len(salt) < MIN_SALT_SIZE or not MIN_ITERATIONS <= iterations <= MAX_ITERATIONS:
        raise ValueError(f"no SCRAM secret: kind={kind!r} iterations={iterations} salt_bytes={len(salt)}")
    salted = hashlib.pbkdf2_hmac(kind, prep_password(password), salt, iterations)
    client_key = hmac.digest(salted, b"Client Key", kind)
    return Secret(
        kind, salt, iterations, hashlib.new(kind, client_key).digest(), hmac.digest(salted, b"Server Key", kind)
    )


def verify(secret: Secret, password: str) -> bool:
    """Does the password fit? Compared in constant time; costs one PBKDF2 like `derive`."""
    try:
        derived = derive(secret.kind, password, salt=secret.salt, iterations=secret.iterations)
    except PasswordError:  # such a password was never stored, for nobody: there is no user to betray by being quick
        return False
    return hmac.compare_digest(derived.stored_key, secret.stored_key)


def fake_secret(key: bytes, kind: str, username: str, host: str, iterations: int) -> Secret:
    """What a user who does not exist shows to the world: the same on each node with that key and at any time.

    Nobody knows a preimage of its stored key, so no password and no proof fits.
    """

    def part(label: str) -> bytes:
        return hmac.digest(key, "\0".join((label, kind, host, username)).encode(), kind)

    return Secret(kind, part("salt")[:SALT_SIZE], iterations, part("stored key"), part("server key"))


def exchange(
    mechanism: str,
    *,
    host: str,
    offered: Sequence[str],
    bindings: Mapping[str, bytes] | None = None,
    server_nonce: str | None = None,
) -> "Exchange":
    """Start an attempt with a mechanism the client took from those `offered` for `host`.

    `bindings` is what the TLS connection can be bound to, type -> data, as it was announced (XEP-0440). It is needed
    for mechanisms without `-PLUS`, too: a client that supports binding but believes we do not (flag `y`) has been lied
    to if we offered it (RFC 5802 section 6). It counts only if a `-PLUS` is among those offered. `server_nonce` is for
    the vectors of the RFCs. Raises `SaslError` `invalid-mechanism`.
    """
    bound = bindings if bindings and any(name.endswith(PLUS) for name in offered) else {}
    if mechanism not in offered:
        raise SaslError("invalid-mechanism", "this mechanism is not offered")
    if mechanism == "PLAIN":
        return _Plain(host, mechanism)
    if mechanism == "ANONYMOUS":
        return _Anonymous(host, mechanism)
    if mechanism.removesuffix(PLUS) not in _KIND_OF or (mechanism.endswith(PLUS) and not bound):
        raise SaslError("invalid-mechanism", "this mechanism is not supported")
    return _Scram(host, mechanism, bound, server_nonce)


class Exchange:
    """One attempt. After a `SaslError` or `Success` it is over: start a new one."""

    def __init__(self, host: str, mechanism: str) -> None:
        self.host = host
        self.mechanism = mechanism
        self.username = ""  # who the client says it is, prepared, as soon as it has said so
        self._asked = False  # for the initial response, with an empty challenge
        self._expects = "first"  # first | secret | verdict | final | nothing

    def receive(self, data: bytes) -> Step:
        """What the client sent in `<auth/>` or `<response/>`, decoded; `b""` for an `<auth/>` without a response."""
        expected, self._expects = self._expects, "nothing"  # whatever fails from here on has ended the attempt
        if expected not in ("first", "final"):
            raise SaslError("malformed-request", "not this client's turn")
        if len(data) > MAX_MESSAGE:
            raise SaslError("malformed-request", f"a message may have at most {MAX_MESSAGE} bytes")
        if not data and expected == "first" and not self._asked:
            self._asked = True
            self._expects = "first"
            return Challenge(b"")
        try:
            text = data.decode()
        except UnicodeDecodeError as exc:
            raise SaslError("malformed-request", "not UTF-8") from exc
        return self._first(text) if expected == "first" else self._final(text)

    def supply(self, secret: Secret) -> Step:
        """The answer to `NeedsSecret`."""
        raise self._unasked("secret")

    def verified(self, ok: bool) -> Step:
        """The answer to `NeedsVerify`. Raises `SaslError` `not-authorized` if the password was wrong."""
        raise self._unasked("verdict")

    def _unasked(self, what: str) -> Exception:
        if self._expects == "nothing":  # the client went on talking while its secret was loaded, and that ended it
            return SaslError("aborted", "the attempt is over")
        return RuntimeError(f"{self.mechanism} did not ask for a {what}")

    def _first(self, text: str) -> Step:
        raise NotImplementedError

    def _final(self, text: str) -> Step:
        raise NotImplementedError

    def _prepare(self, username: str, authzid: str) -> None:
        """Note who it is. Nobody acts for somebody else here: an authzid names the user's own bare JID."""
        if len(username.encode()) > MAX_USERNAME:
            raise SaslError("malformed-request", "the user name is too long")
        try:
            prepared = prep_username(username)
        except JidError as exc:
            raise SaslError("not-authorized", "no user can have this name") from exc
        self.username = prepared
        if authzid:
            try:
                asked = parse(authzid).full
            except JidError:
                asked = ""
            if asked != f"{prepared}@{self.host}":
                raise SaslError("invalid-authzid", "users may act for themselves only")


class _Plain(Exchange):
    def _first(self, text: str) -> Step:
        parts = text.split("\0")
        if len(parts) != 3 or not parts[1] or not parts[2]:
            raise SaslError("malformed-request", "PLAIN is authzid NUL authcid NUL passwd")
        authzid, username, password = parts
        if len(password.encode()) > MAX_PASSWORD:
            raise SaslError("malformed-request", "the password is too long")
        self._prepare(username, authzid)
        self._expects = "verdict"
        return NeedsVerify(self.username, password)

    def verified(self, ok: bool) -> Step:
        if self._expects != "verdict":
            return super().verified(ok)
        self._expects = "nothing"
        if not ok:
            raise SaslError("not-authorized", WRONG)
        return Success(self.username, b"")


class _Anonymous(Exchange):
    def receive(self, data: bytes) -> Step:
        """The trace information is optional, so no data is an answer and not a reason to ask (XEP-0175)."""
        self._asked = True
        return super().receive(data)

    def _first(self, text: str) -> Step:
        if len(text) > MAX_TRACE:
            raise SaslError("malformed-request", f"trace information has at most {MAX_TRACE} characters")
        # 128 random bits: nobody had this name before, and nobody can guess who has it now.
        self.username = secrets.token_hex(16)
        return Success(self.username, b"", anonymous=True)


# The same words for a user who does not exist and for a wrong password, whatever the mechanism.
WRONG: Final = "the user name or the password is wrong"
_WORDS: Final = {
    ServerError.INVALID_PROOF: ("not-authorized", WRONG),
    ServerError.CHANNEL_BINDINGS_DONT_MATCH: ("not-authorized", "the channel bindings do not match"),
    ServerError.SERVER_DOES_SUPPORT_CHANNEL_BINDING: (
        "not-authorized",
        "channel binding was offered, but the client did not see it: somebody may sit in the middle",
    ),
    ServerError.UNSUPPORTED_CHANNEL_BINDING_TYPE: (
        "malformed-request",
        "channel binding of a type that was not announced",
    ),
}


class _Scram(Exchange):
    def __init__(self, host: str, mechanism: str, bindings: Mapping[str, bytes], server_nonce: str | None) -> None:
        super().__init__(host, mechanism)
        self._kind = _KIND_OF[mechanism.removesuffix(PLUS)]
        self._bindings = bindings
        self._server_nonce = server_nonce
        self._server: ScramServer | None = None
        self._flag = self._authzid = self._bare = ""

    def _first(self, text: str) -> Step:
        header = _GS2.fullmatch(text)
        bare = _BARE.fullmatch(header["bare"]) if header else None
        if header is None or bare is None:
            raise SaslError("malformed-request", "no client-first-message of SCRAM (RFC 5802 section 7)")
        self._flag, self._authzid, self._bare = header["flag"], header["authzid"] or "", header["bare"]
        if self._flag[0] == "p" and not self.mechanism.endswith(PLUS):
            raise SaslError("malformed-request", "channel binding needs a mechanism with -PLUS")
        if self._flag[0] == "p" and self._flag[2:] not in self._bindings:
            raise SaslError(*_WORDS[ServerError.UNSUPPORTED_CHANNEL_BINDING_TYPE])
        self._prepare(_unescape(bare["username"]), _unescape(self._authzid))
        self._expects = "secret"
        return NeedsSecret(self.username, self._kind)

    def _binding(self) -> tuple[str, bytes] | None:
        """What the client chose; else any that was offered, for scramp to notice a client that did not see it."""
        name = self._flag[2:] if self._flag[0] == "p" else next(iter(self._bindings), "")
        return (name, self._bindings[name]) if name else None

    def supply(self, secret: Secret) -> Step:
        if self._expects != "secret":
            return super().supply(secret)
        self._expects = "nothing"
        if not usable(secret, self._kind):
            raise SaslError("temporary-auth-failure", "the stored secret of this account cannot be used")
        stored = (secret.salt, secret.stored_key, secret.server_key, secret.iterations)
        try:
            server = ScramMechanism(self.mechanism).make_server(lambda _: stored, self._binding(), self._server_nonce)
            server.set_client_first(f"{self._flag},,{self._bare}")  # scramp refuses any authzid; ours is checked
            if self._authzid:  # but the client's `c=` and its proof cover the header as it was sent
                server.gs2_header = _HeaderAsSent(server.gs2_header, self._authzid)
            challenge: str = server.get_server_first()
        except ScramException as exc:
            raise _translated(exc) from exc
        self._server = server
        self._expects = "final"
        return Challenge(challenge.encode())

    def _final(self, text: str) -> Step:
        assert self._server is not None
        try:
            self._server.set_client_final(text)
            data: str = self._server.get_server_final()
        except ScramException as exc:
            raise _translated(exc) from exc
        return Success(self.username, data.encode())


class _HeaderAsSent(Gs2Header):  # type: ignore[misc]
    """The gs2-header with its authzid, still escaped: what channel binding input begins with (RFC 5802 section 7)."""

    def __init__(self, parsed: Gs2Header, authzid: str) -> None:
        super().__init__(parsed.gs2_char, parsed.cb_name)
        self._authzid = authzid

    def __bytes__(self) -> bytes:
        flag = f"p={self.cb_name}" if self.gs2_char == "p" else self.gs2_char
        return f"{flag},a={self._authzid},".encode()


def _unescape(saslname: str) -> str:
    if _BAD_ESCAPE.search(saslname):
        raise SaslError("malformed-request", "'=' in a name is written =3D, ',' is written =2C")
    return saslname.replace("=2C", ",").replace("=3D", "=")


def usable(secret: Secret, kind: str) -> bool:
    """Whether a secret, wherever it comes from, lets anybody log in."""
    return (
        secret.kind == kind
        and len(secret.salt) >= MIN_SALT_SIZE
        and MIN_ITERATIONS <= secret.iterations <= MAX_ITERATIONS
        and len(secret.stored_key) == len(secret.server_key) == _DIGEST_SIZE[kind]
    )


def _translated(exc: ScramException) -> SaslError:
    return SaslError(*_WORDS.get(exc.server_error, ("malformed-request", str(exc.args[0]))))
