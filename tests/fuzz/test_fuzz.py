"""The fuzz targets for a few seconds, over the corpus, and with servers that are broken on purpose."""

import hmac
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fuzz import main, mutate, sasl_target
from xmppd.protocol import sasl, stanza, stream

ROOT = Path(__file__).parents[2]
SEED = 20_000  # of the first input, for every run to be the same as far as it comes
SECONDS = 4.0
SETTINGS = 8  # limits, cuts, offers that each input of the corpus meets
CASES = [(target, path) for target in main.TARGETS for path in sorted((mutate.CORPUS / target).glob("*.json"))]


@pytest.mark.parametrize(("target", "path"), CASES, ids=lambda value: value.stem if isinstance(value, Path) else value)
def test_an_input_of_the_corpus_breaks_nothing(target, path):
    kept, seed, data = mutate.read(path)
    assert kept == target
    for setting in (seed, *range(SETTINGS)):
        try:
            main.check(target, setting, data)
        except Exception as error:
            error.add_note(f"{path.name} with the seed {setting}")
            raise


@pytest.mark.slow
@pytest.mark.parametrize("target", main.TARGETS)
def test_random_input_breaks_nothing(target, tmp_path, capsys):
    hunt = main.Hunt(target, SEED, tmp_path)
    path = hunt.run(SECONDS)
    assert path is None, f"seed {SEED}, {path.read_text()}\n{capsys.readouterr().out}"
    assert hunt.done > 50
    assert len(hunt.outcomes) > 3, hunt.outcomes


def test_clients_without_fault_get_in():
    """Else all the checks of a success would check nothing."""
    outcomes: dict[str, Counter[str]] = {}
    for name in ("scram", "scram_plus", "plus_end_point", "authzid_own", "plain", "plain_authzid", "anonymous"):
        data = mutate.read(mutate.CORPUS / "sasl" / f"{name}.json")[2]
        outcomes[name] = Counter(sasl_target.check(data, seed) for seed in range(SETTINGS))
        assert outcomes[name]["success"] > SETTINGS // 4, outcomes[name]


def test_an_input_is_the_same_each_time():
    for target in main.TARGETS:
        kept = mutate.corpus(target)
        assert [mutate.make(target, seed, kept) for seed in range(50)] == [
            mutate.make(target, seed, kept) for seed in range(50)
        ]


# -- what is broken is found


def found(target: str, inputs: int = 3000) -> bool:
    """Whether the corpus, or so many random inputs, notice what was broken."""
    kept = mutate.corpus(target)
    try:
        for data in kept:
            for seed in range(SETTINGS):
                main.check(target, seed, data)
        for seed in range(SEED, SEED + inputs):
            main.check(target, seed, mutate.make(target, seed, kept))
    except AssertionError:
        return True
    return False


def _no_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stream.Stream, "_count_bytes", lambda self, data, header_too, out: None)


def _one_level_more(patch: pytest.MonkeyPatch) -> None:
    begin = stream.Stream._open_root

    def deeper(self, element):
        opened = begin(self, element)
        self._depth -= 1
        return opened

    patch.setattr(stream.Stream, "_open_root", deeper)


def _any_sender(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stream, "_is_own", lambda claimed, own: True)


def _the_servers_raw_bytes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stream, "_declares_oddly", lambda chunk: False)


def _names_not_counted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stream.Stream, "_novel", lambda self, name: None)


def _prefixes_lost(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(stanza, "_prefixes", lambda stanza: {})


def _any_authzid(patch: pytest.MonkeyPatch) -> None:
    original = sasl.Exchange._prepare
    patch.setattr(sasl.Exchange, "_prepare", lambda self, username, authzid: original(self, username, ""))


def _authzid_counts(patch: pytest.MonkeyPatch) -> None:
    original = sasl.Exchange._prepare

    def prepare(self, username, authzid):
        original(self, username, "")
        if authzid:
            self.username = authzid.partition("@")[0]

    patch.setattr(sasl.Exchange, "_prepare", prepare)


def _no_downgrade_seen(patch: pytest.MonkeyPatch) -> None:
    binding = sasl._Scram._binding
    patch.setattr(sasl._Scram, "_binding", lambda self: binding(self) if self._flag[0] == "p" else None)


def _any_proof(patch: pytest.MonkeyPatch) -> None:
    def final(self, text):
        return sasl.Success(self.username, b"v=" + hmac.digest(b"", b"", "sha1"))

    patch.setattr(sasl._Scram, "_final", final)


def _verdict_ignored(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(sasl._Plain, "verified", lambda self, ok: sasl.Success(self.username, b""))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "breakage"),
    [
        ("stream", _no_size),
        ("stream", _one_level_more),
        ("stream", _any_sender),
        ("stream", _the_servers_raw_bytes),
        ("stream", _names_not_counted),
        ("stream", _prefixes_lost),
        ("sasl", _any_authzid),
        ("sasl", _authzid_counts),
        ("sasl", _no_downgrade_seen),
        ("sasl", _any_proof),
        ("sasl", _verdict_ignored),
    ],
)
def test_a_broken_server_is_noticed(target: str, breakage: Callable[[pytest.MonkeyPatch], None], monkeypatch):
    breakage(monkeypatch)
    assert found(target)


# -- the command


def fuzz(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XMPPD_PYTHON": main.sys.executable}
    return subprocess.run(
        [str(ROOT / "scripts" / "fuzz"), *arguments], capture_output=True, text=True, timeout=120, env=environment
    )


@pytest.mark.slow
def test_the_command_hunts_for_a_while_and_says_with_which_seed(tmp_path):
    done = fuzz("stream", "--seconds", "2", "--seed", str(SEED), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"stream: seed {SEED}\n" in done.stdout
    assert " inputs in " in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_kept_input_is_replayed(tmp_path):
    done = fuzz("replay", str(mutate.CORPUS / "stream" / "chat.json"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "nothing is wrong with it" in done.stdout
    # A seed that is none makes the check fail: the fault of an input is told, too.
    path = tmp_path / "broken.json"
    mutate.write(path, "no_such_target", 0, b"")
    done = fuzz("replay", str(path))
    assert done.returncode == 1
    assert "an invariant is broken" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("__import__('ctypes').string_at(0)", "killed by SIGSEGV"),
        ("__import__('os').abort()", "killed by SIGABRT"),
        ("exec('while True: pass')", "not done after"),
    ],
)
def test_an_input_that_kills_the_process_is_kept(fault, words, tmp_path, monkeypatch, capsys):
    """The parent lives on, and knows which input it was."""
    begin = main.start

    def start(command, said):
        code = (
            "import sys; from tests.fuzz import main\n"
            f"def check(target, seed, data):\n    if seed == {SEED + 5}: {fault}\n    return 'fine'\n"
            "main.check = check; main.main()"
        )
        monkeypatch.setattr(main, "PROGRAM", ["-c", code])
        return begin(command, said)

    monkeypatch.setattr(main, "start", start)
    monkeypatch.setattr(main, "_HANGS", 1.0)

    hunt = main.Hunt("sasl", SEED, tmp_path)
    path = hunt.run(60)

    assert path is not None
    assert mutate.read(path) == ("sasl", SEED + 5, mutate.make("sasl", SEED + 5, mutate.corpus("sasl")))
    assert hunt.done == 6
    said = capsys.readouterr().out
    assert words in said
    assert f"scripts/fuzz replay {path}" in said
