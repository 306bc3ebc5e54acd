"""What must hold for a login whatever the client says: nobody gets in without the password, nor as somebody else.

The judge of an exchange is a second reading of RFC 5802 and RFC 4616 here, strict, without scramp.
"""

import base64
import hmac
import random
import re
from dataclasses import dataclass
from functools import cache
from typing import Final

from xmppd.errors import JidError
from xmppd.protocol import sasl
from xmppd.protocol.jid import make, parse
from xmppd.protocol.sasl import Challenge, Exchange, NeedsSecret, NeedsVerify, SaslError, Step, Success

HOST: Final = "localhost"
PASSWORDS: Final = {"juliet": "pencil", "romeo": "of which no client here has ever heard", "a,b": "pencil"}
ITERATIONS: Final = 4096
BINDINGS: Final = {"tls-server-end-point": b"certificate", "tls-unique": b"finished"}
LONGEST: Final = 1024  # bytes of what we say, characters of an error's text
_NOT_XML: Final = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SERVER_NONCE: Final = "3rfcNHYJY1ZVvWVs7j"


@cache
def _secret(username: str, kind: str) -> sasl.Secret:
    if username not in PASSWORDS:
        return sasl.fake_secret(b"key", kind, username, HOST, ITERATIONS)
    return sasl.derive(kind, PASSWORDS[username], salt=f"salt of {username:>10}".encode(), iterations=ITERATIONS)


@cache
def _client_key(username: str, password: str, kind: str) -> bytes:
    secret = _secret(username, kind)
    salted = sasl.hashlib.pbkdf2_hmac(kind, password.encode(), secret.salt, ITERATIONS)
    return hmac.digest(salted, b"Client Key", kind)


@cache
def _fits(username: str, password: str) -> bool:
    return sasl.verify(_secret(username, "sha256"), password)


@dataclass(slots=True)
class _Client:
    """What the client has seen and said, and the password it believes in."""

    mechanism: str
    password: str
    bindings: dict[str, bytes]
    said: bytes = b""  # the first message
    heard: bytes = b""  # the challenge
    asked: str = ""  # whose secret the server looked up
    final: bytes = b""

    @property
    def kind(self) -> str:
        return self.mechanism.removesuffix("-PLUS").removeprefix("SCRAM-").replace("-", "").lower()

    @property
    def header(self) -> bytes:
        return b",".join(self.said.split(b",", 2)[:2]) + b","

    @property
    def bare(self) -> bytes:
        return self.said.split(b",", 2)[-1]

    @property
    def binding(self) -> bytes:
        flag = self.said.split(b",", 1)[0].decode(errors="replace")
        return self.bindings.get(flag[2:], b"") if flag.startswith("p=") else b""

    def write(self, line: bytes) -> bytes:
        """Fill in what only the running exchange knows."""
        nonce = self.heard.split(b",", 1)[0].removeprefix(b"r=")
        line = line.replace(b"{bind}", base64.b64encode(self.header + self.binding)).replace(b"{nonce}", nonce)
        line = line.replace(b"{other}", base64.b64encode(self.header + b"another connection's"))
        line = line.replace(b"{password}", self.password.encode())
        wrong = base64.b64encode(b"\x01" * 32)
        if b"{proof}" in line:
            line = line.replace(b"{proof}", self._proof(line) if self.kind in sasl.KINDS else wrong)
        return line.replace(b"{wrong}", wrong)

    def _proof(self, line: bytes) -> bytes:
        key = _client_key(self.asked, self.password, self.kind)
        stored = sasl.hashlib.new(self.kind, key).digest()
        message = b",".join((self.bare, self.heard, line[: max(0, line.rfind(b",p="))]))
        return base64.b64encode(_xor(key, hmac.digest(stored, message, self.kind)))


def check(data: bytes, seed: int) -> str:
    """Let the client talk; the seed decides what is offered and whether it knows a password. Returns the outcome."""
    rng = random.Random(seed)
    first, *lines = data.split(b"\n")
    mechanism = first.decode(errors="replace")
    knows = rng.random() < 0.7
    bindings = BINDINGS if rng.random() < 0.6 else {}
    offered = [*sasl.MECHANISMS.values(), "PLAIN"] + ["ANONYMOUS"] * (rng.random() < 0.7)
    if bindings and rng.random() < 0.8:
        offered += [name + sasl.PLUS for name in sasl.MECHANISMS.values()]
    _names(data)
    client = _Client(mechanism, "pencil" if knows else "a guess", dict(bindings))
    try:
        attempt = sasl.exchange(mechanism, host=HOST, offered=offered, bindings=bindings, server_nonce=_SERVER_NONCE)
    except SaslError as error:
        _sound(error)
        return error.condition
    assert mechanism in offered, f"{mechanism} is not offered"
    outcome = "unfinished"
    for line in lines:
        try:
            step = _say(attempt, client, line)
        except SaslError as error:
            _sound(error)
            if outcome == "unfinished":
                outcome = error.condition
            continue
        assert outcome == "unfinished", f"{step} after {outcome}"
        if isinstance(step, Success):
            outcome = "success"
            _judge(step, client, offered, knows)
            assert attempt.username == step.username
    return outcome


def _say(attempt: Exchange, client: _Client, line: bytes) -> Step:
    early, line = line.startswith(b"!"), line.removeprefix(b"!")
    message = client.write(line)
    opening = not client.said
    if opening:
        client.said = message
    else:
        client.final = message
    step = attempt.receive(message)
    if isinstance(step, Challenge) and not step.data:
        assert opening
        assert not message
        client.said = b""
        return step
    busy = isinstance(step, NeedsSecret | NeedsVerify)
    if early and busy:  # it goes on talking while somebody works for it
        try:
            attempt.receive(message)
        except SaslError as error:
            _sound(error)
        else:
            raise AssertionError("two messages were taken at a time")
    if isinstance(step, NeedsSecret):
        assert step.kind == client.kind, f"{step.kind} for {client.mechanism}"
        client.asked = step.username
        step = attempt.supply(_secret(step.username, step.kind))
        assert isinstance(step, Challenge)
        client.heard = step.data
    elif isinstance(step, NeedsVerify):
        assert attempt.mechanism == "PLAIN"
        client.asked = step.username
        step = attempt.verified(_fits(step.username, step.password))
    assert isinstance(step, Challenge | Success)
    assert len(step.data) <= LONGEST, f"{len(step.data)} bytes of challenge"
    assert not (early and busy), "an attempt goes on that its client has talked into"
    return step


def _sound(error: SaslError) -> None:
    assert error.condition in sasl.CONDITIONS
    assert len(error.text) <= LONGEST, f"a text of {len(error.text)} characters"
    assert not _NOT_XML.search(error.text), f"{error.text!r} cannot be sent"


def _judge(step: Success, client: _Client, offered: list[str], knows: bool) -> None:
    """Whether this success is one."""
    assert step.anonymous == (client.mechanism == "ANONYMOUS")
    assert make(step.username, HOST).local == step.username
    if step.anonymous:
        assert re.fullmatch("[0-9a-f]{32}", step.username)
        return
    assert knows, "without the password"
    assert PASSWORDS.get(step.username) == "pencil", f"as {step.username}, whose password it does not know"
    assert step.username == client.asked, f"{client.asked} proved to be himself, and is {step.username}"
    if client.mechanism == "PLAIN":
        authzid, username, password = client.said.decode().split("\0")
        assert sasl.prep_password(password) == b"pencil"
        assert step.data == b""
    else:
        authzid, username = _judge_scram(step, client, offered)
    assert sasl.prep_username(username) == step.username, f"{username} became {step.username}"
    if authzid:
        assert parse(authzid).full == f"{step.username}@{HOST}", f"acts for {authzid}"


def _judge_scram(step: Success, client: _Client, offered: list[str]) -> tuple[str, str]:
    """RFC 5802 sections 3, 5, 6 and 7 over the messages as they went over the wire."""
    flag, _, authzid = client.header.decode()[:-1].partition(",")
    bindable = bool(client.bindings) and any(name.endswith(sasl.PLUS) for name in offered)
    assert flag.startswith("p=") == client.mechanism.endswith(sasl.PLUS), f"{client.mechanism} with the flag {flag}"
    assert flag in ("n", "y") or flag[2:] in client.bindings, f"bound with {flag}"
    assert not (flag == "y" and bindable), "somebody has taken the -PLUS out of what was offered"
    name, nonce = client.bare.decode().split(",")[:2]
    assert nonce.startswith("r=")
    assert client.heard.startswith((nonce + _SERVER_NONCE + ",").encode())
    without_proof, _, proof = client.final.rpartition(b",p=")
    parts = without_proof.split(b",")
    assert parts[0] == b"c=" + base64.b64encode(client.header + client.binding), "bound to another connection"
    assert parts[1] == (nonce + _SERVER_NONCE).encode(), "with another nonce"
    secret = _secret(step.username, client.kind)
    message = b",".join((client.bare, client.heard, without_proof))
    key = _xor(base64.b64decode(proof, validate=True), hmac.digest(secret.stored_key, message, client.kind))
    assert sasl.hashlib.new(client.kind, key).digest() == secret.stored_key, "the proof is wrong"
    signature = hmac.digest(secret.server_key, message, client.kind)
    assert step.data == b"v=" + base64.b64encode(signature)
    assert authzid[:2] in ("", "a=")
    assert name.startswith("n=")
    return _plain(authzid[2:]), _plain(name[2:])


def _plain(saslname: str) -> str:
    return re.sub("=(2C|3D)", lambda escaped: {"2C": ",", "3D": "="}[escaped[1]], saslname)


def _xor(one: bytes, other: bytes) -> bytes:
    assert len(one) == len(other), "a proof of another length"
    return bytes(a ^ b for a, b in zip(one, other, strict=True))


def _names(data: bytes) -> None:
    """Names and passwords alone: they are prepared, or refused by name, and a prepared name stays what it is."""
    for text in re.split("[\0\n,=]", data.decode(errors="surrogateescape"))[:12]:
        try:
            username = sasl.prep_username(text)
        except JidError:
            pass
        else:
            assert make(username, HOST).local == username, f"{text!r} is {username!r} first, then another"
        try:
            prepared = sasl.prep_password(text)
        except sasl.PasswordError:
            continue
        assert prepared
