"""Accounts and passwords: what an outsider can learn, and how much work he can cause."""

import asyncio
import threading
from dataclasses import dataclass, field

import pytest

from xmppd.auth import Auth, AuthBusy
from xmppd.errors import JidError, StorageUnavailable
from xmppd.protocol import sasl
from xmppd.protocol.sasl import PasswordError, Secret

HOST = "localhost"


@dataclass
class Scram:
    hashes: tuple[str, ...] = ("sha1", "sha256")
    iterations: int = 4096


@dataclass
class Settings:
    auth_scram: Scram = field(default_factory=Scram)
    disable_sasl_mechanisms: tuple[str, ...] = ()
    auth_method: tuple[str, ...] = ("sql",)


class Config:
    def __init__(self, **hosts):
        self.hosts = {HOST: Settings(), **hosts}

    def for_host(self, host):
        return self.hosts[host]


@dataclass
class Account:
    secrets: dict[str, Secret]


class Accounts:
    """Accounts in memory that count how often they are asked."""

    def __init__(self):
        self.rows = {}
        self.asked = []
        self.trouble = None

    def _ask(self, what):
        self.asked.append(what)
        if self.trouble:
            raise self.trouble

    async def get(self, host, username):
        self._ask("get")
        return self.rows.get((host, username))

    async def exists(self, host, username):
        self._ask("exists")
        return (host, username) in self.rows

    async def create(self, host, username, secrets):
        self._ask("create")
        return self.rows.setdefault((host, username), made := Account(dict(secrets))) is made

    async def set_secrets(self, host, username, secrets):
        self._ask("set_secrets")
        if (host, username) not in self.rows:
            return False
        self.rows[host, username] = Account(dict(secrets))
        return True

    async def remove(self, host, username):
        self._ask("remove")
        return self.rows.pop((host, username), None) is not None

    async def fake_salt_key(self):
        self._ask("fake_salt_key")
        return b"the same on all nodes"


@pytest.fixture
def accounts():
    return Accounts()


@pytest.fixture
def auth(accounts):
    auth = Auth(accounts, Config())
    yield auth
    auth.close()


@pytest.fixture
def hashed(monkeypatch):
    """Each PBKDF2 that is computed: (kind, iterations)."""
    calls = []
    real = sasl.hashlib.pbkdf2_hmac

    def count(kind, password, salt, iterations):
        calls.append((kind, iterations))
        return real(kind, password, salt, iterations)

    monkeypatch.setattr(sasl.hashlib, "pbkdf2_hmac", count)
    return calls


async def test_an_account_lives_from_register_to_remove(auth):
    assert await auth.register(HOST, "Juliet", "pencil")
    assert not await auth.register(HOST, "juliet", "other")
    assert await auth.check_password(HOST, "JULIET", "pencil")
    assert not await auth.check_password(HOST, "juliet", "other")

    assert await auth.set_password(HOST, "juliet", "r0m30")
    assert await auth.check_password(HOST, "juliet", "r0m30")
    assert not await auth.check_password(HOST, "juliet", "pencil")

    assert await auth.remove(HOST, "juliet")
    assert not await auth.remove(HOST, "juliet")
    assert not await auth.check_password(HOST, "juliet", "r0m30")
    assert not await auth.set_password(HOST, "juliet", "pencil")


async def test_of_two_who_register_one_name_at_once_one_gets_it(auth):
    results = await asyncio.gather(*(auth.register(HOST, "juliet", str(n)) for n in range(5)))
    assert results.count(True) == 1
    assert await auth.check_password(HOST, "juliet", str(results.index(True)))


async def test_an_account_keeps_a_secret_for_each_hash_listed(auth, accounts):
    await auth.register(HOST, "juliet", "pencil")
    stored = accounts.rows[HOST, "juliet"].secrets
    assert set(stored) == {"sha1", "sha256"}
    assert all(sasl.verify(secret, "pencil") and secret.iterations == 4096 for secret in stored.values())
    assert "pencil" not in repr(stored)
    for kind, secret in stored.items():
        assert await auth.secret_for(HOST, "juliet", kind) == (secret, True)


def test_mechanisms_strongest_first_and_plain_under_tls_only(accounts):
    config = Config(
        wide=Settings(Scram(("sha1", "sha512", "sha256"))),
        narrow=Settings(Scram(("sha1", "sha256")), ("plain", "SCRAM-SHA-1")),
    )
    auth = Auth(accounts, config)
    assert auth.mechanisms(HOST, tls=True) == ["SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"]
    assert auth.mechanisms(HOST, tls=False) == ["SCRAM-SHA-256", "SCRAM-SHA-1"]
    assert auth.mechanisms("wide", tls=True) == ["SCRAM-SHA-512", "SCRAM-SHA-256", "SCRAM-SHA-1", "PLAIN"]
    assert auth.mechanisms("narrow", tls=True) == ["SCRAM-SHA-256"]
    auth.close()


def test_mechanisms_with_channel_binding_come_first_and_anonymous_last(accounts):
    config = Config(
        guests=Settings(auth_method=("anonymous",)),
        both=Settings(auth_method=("sql", "anonymous")),
        bound=Settings(disable_sasl_mechanisms=("PLAIN", "SCRAM-SHA-1", "SCRAM-SHA-256")),
    )
    auth = Auth(accounts, config)
    scram = ["SCRAM-SHA-256", "SCRAM-SHA-1"]
    plus = [f"{name}-PLUS" for name in scram]
    assert auth.mechanisms(HOST, tls=True, bound=True) == [*plus, *scram, "PLAIN"]
    assert auth.mechanisms("guests", tls=True, bound=True) == ["ANONYMOUS"]
    assert auth.mechanisms("guests", tls=False) == ["ANONYMOUS"]
    assert auth.mechanisms("both", tls=True, bound=True) == [*plus, *scram, "PLAIN", "ANONYMOUS"]
    assert auth.mechanisms("bound", tls=True, bound=True) == plus
    assert auth.mechanisms("bound", tls=True) == []
    auth.close()


async def test_an_unknown_user_costs_what_a_known_one_costs(auth, accounts, hashed):
    await auth.register(HOST, "juliet", "pencil")
    await auth.check_password(HOST, "juliet", "pencil")  # the key of the fake salts is asked for once

    async def work(username, password):
        accounts.asked.clear()
        hashed.clear()
        await auth.check_password(HOST, username, password)
        return list(accounts.asked), list(hashed)

    right = await work("juliet", "pencil")
    assert right == (["get"], [("sha256", 4096)])
    assert await work("juliet", "wrong") == right
    assert await work("nobody", "pencil") == right
    for impossible in ("", "x" * 1025, "a\0b"):
        assert await work("juliet", impossible) == await work("nobody", impossible) == (["get"], [])


async def test_the_first_login_after_the_start_betrays_nobody_either(accounts):
    config = Config()
    seen = []
    for username in ("juliet", "nobody"):
        fresh = Auth(accounts, config)
        if username == "juliet":
            await fresh.register(HOST, username, "pencil")
        accounts.asked.clear()
        await fresh.secret_for(HOST, username, "sha1")
        seen.append(list(accounts.asked))
        fresh.close()
    assert seen[0] == seen[1]


async def test_scram_with_an_unknown_user_costs_and_shows_the_same(auth, accounts, hashed):
    await auth.register(HOST, "juliet", "pencil")
    await auth.secret_for(HOST, "juliet", "sha256")
    accounts.asked.clear()
    hashed.clear()

    real, known = await auth.secret_for(HOST, "juliet", "sha256")
    fake, unknown = await auth.secret_for(HOST, "nobody", "sha256")

    assert (known, unknown) == (True, False)
    assert accounts.asked == ["get", "get"]
    assert hashed == []
    assert (fake.kind, fake.iterations, len(fake.salt)) == (real.kind, real.iterations, len(real.salt))
    assert (await auth.secret_for(HOST, "nobody", "sha256"))[0] == fake


async def test_another_node_shows_the_same_fake_salt(auth):
    other = Auth(Accounts(), Config())
    assert await auth.secret_for(HOST, "nobody", "sha1") == await other.secret_for(HOST, "nobody", "sha1")
    other.close()


async def test_an_account_without_that_kind_looks_like_a_wrong_password(auth, accounts):
    only_sha1 = sasl.derive("sha1", "pencil", iterations=4096)
    accounts.rows[HOST, "juliet"] = Account({"sha1": only_sha1})
    secret, real = await auth.secret_for(HOST, "juliet", "sha256")
    assert not real
    assert secret.kind == "sha256"
    assert await auth.check_password(HOST, "juliet", "pencil")  # PLAIN goes on with what there is


async def test_an_account_without_any_secret_has_no_password(auth, accounts):
    accounts.rows[HOST, "juliet"] = Account({})
    assert not await auth.check_password(HOST, "juliet", "pencil")


async def test_storage_trouble_is_no_wrong_password(auth, accounts):
    accounts.trouble = StorageUnavailable("the database is away")
    for attempt in (
        auth.check_password(HOST, "juliet", "pencil"),
        auth.secret_for(HOST, "juliet", "sha1"),
        auth.register(HOST, "juliet", "pencil"),
        auth.set_password(HOST, "juliet", "pencil"),
        auth.remove(HOST, "juliet"),
    ):
        with pytest.raises(StorageUnavailable):
            await attempt
    accounts.trouble = None
    assert await auth.register(HOST, "juliet", "pencil")


@pytest.mark.parametrize("password", ["", "\u00ad", "x" * 1025, "a\0b"])
async def test_impossible_passwords_are_refused_before_any_work(auth, accounts, hashed, password):
    with pytest.raises(PasswordError):
        await auth.register(HOST, "juliet", password)
    with pytest.raises(PasswordError):
        await auth.set_password(HOST, "juliet", password)
    assert (accounts.asked, hashed) == ([], [])


async def test_impossible_names(auth):
    for attempt in (auth.register, auth.set_password):
        with pytest.raises(JidError):
            await attempt(HOST, "a@b", "pencil")
    assert not await auth.check_password(HOST, "a@b", "pencil")


async def test_more_than_the_limit_is_refused_at_once_and_places_come_back(accounts, monkeypatch):
    auth = Auth(accounts, Config(), threads=2, max_waiting=3)
    await auth.register(HOST, "juliet", "pencil")
    gate, running, most = threading.Event(), [0], [0]
    lock = threading.Lock()
    real = sasl.verify

    def slow(secret, password):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        gate.wait()
        with lock:
            running[0] -= 1
        return real(secret, password)

    monkeypatch.setattr(sasl, "verify", slow)
    checks = [asyncio.create_task(auth.check_password(HOST, "juliet", "pencil")) for _ in range(3)]
    for _ in range(5):
        await asyncio.sleep(0)  # each has handed its work in
    with pytest.raises(AuthBusy):
        await auth.check_password(HOST, "juliet", "pencil")

    checks[2].cancel()  # its stream is gone while it waits for a thread: its place is free again
    with pytest.raises(asyncio.CancelledError):
        await checks[2]
    checks[2] = asyncio.create_task(auth.check_password(HOST, "juliet", "pencil"))
    gate.set()

    assert await asyncio.gather(*checks) == [True] * 3
    assert most[0] <= 2
    assert auth._waiting == 0
    auth.close()


async def test_the_event_loop_goes_on_while_passwords_are_checked(auth, accounts, monkeypatch):
    await auth.register(HOST, "juliet", "pencil")
    gate = threading.Event()
    real = sasl.verify
    monkeypatch.setattr(sasl, "verify", lambda secret, password: gate.wait(10) and real(secret, password))
    check = asyncio.create_task(auth.check_password(HOST, "juliet", "pencil"))
    await asyncio.sleep(0)
    gate.set()  # never reached if the check blocked the loop
    assert await check
