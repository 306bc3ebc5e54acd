"""A short chaos run, a longer one, and the proof that a loss would be seen."""

import json
from typing import Any

import pytest

from tests import mariadb
from tests.chaos.book import Account, Book
from tests.chaos.main import main


def run(tmp_path, *arguments: str) -> tuple[int, dict[str, Any]]:
    code = main([*arguments, "--keep", str(tmp_path / "run"), "--report", str(tmp_path / "report.json")])
    assert (tmp_path / "report.json").exists(), f"the run failed with {code}"
    return code, json.loads((tmp_path / "report.json").read_text())


def kept(code: int, report: dict[str, Any]) -> None:
    assert report["lost"] == report["out_of_order"] == report["wrong"] == 0, report["named"]
    assert code == 0
    assert report["never_acknowledged"] == 0
    assert report["spooled_at_the_end"] == 0


def test_nothing_is_lost_in_a_short_run(tmp_path):
    arguments = "--pairs 10 --rate 150 --time 24 --kills 2 --faults 4 --longest 8 --seed 6"
    code, report = run(tmp_path, *arguments.split())

    kept(code, report)
    assert report["faults"]["kill"] == 2
    assert report["clients"]["resets"] > 0
    assert report["clients"]["resumed on another node"] > 0
    assert report["acknowledged"] > 300


@pytest.mark.long
@pytest.mark.mariadb
def test_nothing_is_lost_in_two_minutes_on_mariadb(tmp_path):
    if (why := mariadb.missing()) and not mariadb.required():
        pytest.skip(why)
    arguments = "--mysql --pairs 30 --rate 300 --time 120 --kills 5 --faults 5 --unacknowledged 500 --seed 7"
    code, report = run(tmp_path, *arguments.split())

    kept(code, report)
    assert report["faults"]["kill"] == 5
    assert max(report["unacknowledged_at_kills"]) >= 500
    assert set(report["faults"]) >= {"freeze", "cut", "nats"}
    assert report["clients"]["resumed on another node"] > 0


@pytest.mark.long
def test_a_server_that_acknowledges_early_is_seen_to_lose_messages(tmp_path):
    arguments = "--self-check --nodes 1 --pairs 10 --rate 200 --time 3 --kills 1 --only none --seed 8"
    code, report = run(tmp_path, *arguments.split())

    assert code == 0
    assert report["lost"] > 0
    assert not report["good"]
    assert report["named"]["lost"][0]["acknowledged_by"]


# -- the books


@pytest.fixture
def account():
    return Account("romeo", "juliet", managed=True)


def written(account, count):
    return [account.write() for _ in range(count)]


def test_what_is_acknowledged_and_does_not_come_is_lost(account):
    one, two, _ = written(account, 3)
    for number in (one, two):
        account.acknowledge(number, node=0)
    account.arrive(one, "romeo-1", node=1)

    assert account.lost() == [two]
    assert account.about(two)["id"] == "romeo-2"
    account.give_back(two)
    assert account.lost() == []
    assert not account.arrive(one, "romeo-1", node=1)


def test_what_comes_twice_is_counted_and_what_is_overtaken_is_named(account):
    one, two, three = written(account, 3)

    assert account.arrive(one, "romeo-1", node=0)
    assert account.arrive(three, "romeo-3", node=0)
    assert account.arrive(two, "romeo-2", node=0)
    assert not account.arrive(one, "romeo-1", node=0)

    assert account.repeated == 1
    assert [(found["number"], found["after"]) for found in account.disorder] == [(two, three)]
    assert account.wrong == []


def test_second_copies_may_come_behind_what_a_dead_node_had_stored(account):
    one, two, three, four, five, _ = written(account, 6)
    account.write_again([one, two, three], forgotten=True)

    account.arrive(two, "romeo-2", node=0)  # its first copy; of the first one there is only the second
    account.arrive(one, "romeo-1", node=0)
    account.arrive(four, "romeo-4", node=0)  # written in the new session
    account.arrive(three, "romeo-3", node=0)
    account.write_again([five, 6], forgotten=False)
    account.arrive(6, "romeo-6", node=0)
    account.arrive(five, "romeo-5", node=0)

    assert account.excused == 1
    assert [(found["number"], found["after"]) for found in account.disorder] == [(three, four), (five, 6)]


def test_second_copies_stay_second_copies_in_the_sessions_that_follow(account):
    one, two = written(account, 2)
    account.write_again([one, two], forgotten=True)
    account.write_again([one, two], forgotten=False)

    account.arrive(two, "romeo-2", node=0)
    account.arrive(one, "romeo-1", node=0)

    assert (account.excused, account.disorder) == (1, [])


def test_what_was_given_back_may_come_late(account):
    one, two = written(account, 2)
    account.give_back(one)

    account.arrive(two, "romeo-2", node=0)
    account.arrive(one, "romeo-1", node=0)

    assert (account.excused, account.disorder) == (1, [])


def test_another_id_is_wrong_and_so_is_a_number_nobody_wrote(account):
    written(account, 1)

    account.arrive(1, "romeo-7", node=0)
    account.arrive(2, "romeo-2", node=0)

    assert [found["number"] for found in account.wrong] == [1, 2]


def test_without_stream_management_order_holds_within_a_stream():
    account = Account("romeo", "juliet", managed=False)
    written(account, 2)
    account.new_stream()
    written(account, 2)

    for number in (3, 1, 4, 2):
        account.arrive(number, f"romeo-{number}", node=0)

    assert account.disorder == []
    assert account.lost() == []


def test_the_verdict_names_what_is_missing():
    book = Book()
    account = book.open(Account("romeo", "juliet", managed=True))
    account.acknowledge(account.write(), node=2)

    verdict = book.verdict()

    assert not verdict["good"]
    assert verdict["named"]["lost"][0]["acknowledged_by"] == 3
    assert book.owed() == 1
    book.arrive("juliet", "romeo", 1, "romeo-1", stored=False, node=0)
    assert book.verdict()["good"]
    book.arrive("nurse", "romeo", 1, "romeo-1", stored=False, node=0)
    assert book.verdict()["wrong"] == 1
