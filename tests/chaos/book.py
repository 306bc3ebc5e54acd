"""The books of a run of scripts/chaos: what was written, acknowledged, brought back and delivered, and the verdict.

Every sender has one recipient and numbers its messages from 1. What counts is what the recipient's client has handled:
with stream management it has handled a message when it has said so in an <a/>.
"""

import time
from array import array
from bisect import bisect
from collections import Counter
from typing import Any, Final

SENT, ACKED, ARRIVED, RETURNED = 1, 2, 4, 8
_NAMED: Final = 1000  # messages named of each kind of trouble; the rest are counted


class Account:
    """What one client wrote to its peer. `managed`: it has stream management, and so `<a/>` tell it what is safe."""

    def __init__(self, sender: str, recipient: str, *, managed: bool, id: str = "") -> None:
        self.sender, self.recipient, self.managed = sender, recipient, managed
        self._id = id  # of all messages, where the client uses the same again and again
        self.state = bytearray(1)  # by number; there is no message 0
        self.acked_at = array("d", [0.0])
        self.acked_by = array("b", [-1])  # number of the node
        self.streams = [0]  # the first number that each stream of a client without stream management wrote
        self._again: dict[int, int] = {}  # by number: the last session in which it was written again, without an `h`
        self._sessions = 0
        self._highest: dict[int, tuple[int, str]] = {}  # by stream: the number, and how it came
        self.repeated = 0
        self.disorder: list[dict[str, Any]] = []
        self.excused = 0
        self.wrong: list[dict[str, Any]] = []

    def id(self, number: int) -> str:
        return self._id or f"{self.sender}-{number}"

    def write(self) -> int:
        """The number of a new message."""
        self.state.append(SENT)
        self.acked_at.append(0.0)
        self.acked_by.append(-1)
        return len(self.state) - 1

    def new_stream(self) -> None:
        """Without stream management nothing is sent again, and order holds within a stream (RFC 6120 10.1)."""
        if not self.managed:
            self.streams.append(len(self.state))

    def write_again(self, numbers: list[int], *, forgotten: bool) -> None:
        """In a new session. `forgotten`: nobody could say how much of the old one had arrived, its node being dead: it
        may have stored a later one of these, and not an earlier one, which then comes with its second copy."""
        self._sessions += 1
        for number in numbers:
            if forgotten:
                self._again[number] = self._sessions

    def _is_second_copy(self, number: int, highest: int) -> bool:
        session = self._again.get(number)
        return session is not None and session == self._again.get(highest)

    def acknowledge(self, number: int, node: int) -> None:
        if not self.state[number] & ACKED:
            self.state[number] |= ACKED
            self.acked_at[number] = time.time()
            self.acked_by[number] = node

    def give_back(self, number: int) -> None:
        """The sender was told that it could not be delivered."""
        self.state[number] |= RETURNED

    def arrive(self, number: int, id: str, node: int, *, stored: bool = False) -> bool:
        """Whether it is the first time. `stored`: it has a delay stamp."""
        if not 0 < number < len(self.state):
            self.wrong.append({"from": self.sender, "number": number, "what": "was never sent"})
            return False
        if id != self.id(number):
            self.wrong.append({"from": self.sender, "number": number, "what": f"came with the id {id!r}"})
        if self.state[number] & ARRIVED:
            self.repeated += 1
            return False
        self.state[number] |= ARRIVED
        stream = bisect(self.streams, number)
        how = f"{time.time():.3f} on {node + 1}{' from the spool' if stored else ''}"
        highest, before = self._highest.get(stream, (0, ""))
        if number < highest and (self.state[number] & RETURNED or self._is_second_copy(number, highest)):
            self.excused += 1
        elif number < highest:
            self.disorder.append({**self.about(number), "arrived": how, "after": highest, "which_arrived": before})
        else:
            self._highest[stream] = (number, how)
        return True

    def about(self, number: int) -> dict[str, Any]:
        """Names a message, and says who is answerable for it."""
        return {
            "from": self.sender,
            "to": self.recipient,
            "number": number,
            "id": self.id(number),
            "acknowledged_at": self.acked_at[number] or None,
            "acknowledged_by": self.acked_by[number] + 1 or None,
        }

    def lost(self) -> list[int]:
        """Acknowledged, and neither at its recipient nor given back."""
        if not self.managed:
            return []
        return [number for number, state in enumerate(self.state) if state & ~SENT == ACKED]

    def count(self, mark: int) -> int:
        return sum(count for state, count in Counter(self.state).items() if state & mark)


class Book:
    """All accounts, by the sender's name."""

    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.arrived = 0
        self.sent = 0

    def open(self, account: Account) -> Account:
        self.accounts[account.sender] = account
        return account

    def arrive(self, recipient: str, sender: str, number: int, id: str, stored: bool, node: int) -> None:
        account = self.accounts[sender]
        if account.recipient != recipient:
            account.wrong.append({**account.about(number), "what": f"came to {recipient}"})
        elif account.arrive(number, id, node, stored=stored):
            self.arrived += 1

    def owed(self) -> int:
        """How many are acknowledged and have not come (yet)."""
        return sum(len(account.lost()) for account in self.accounts.values())

    def verdict(self) -> dict[str, Any]:
        """What came of everything; `good` says whether the promise was kept."""
        accounts = list(self.accounts.values())
        lost = [account.about(number) for account in accounts for number in account.lost()]
        disorder = [one for account in accounts for one in account.disorder]
        wrong = [one for account in accounts for one in account.wrong]
        managed = [account for account in accounts if account.managed]
        plain = [account for account in accounts if not account.managed]
        return {
            "good": not lost and not disorder and not wrong,
            "sent": sum(account.count(SENT) for account in accounts),
            "acknowledged": sum(account.count(ACKED) for account in accounts),
            "arrived": self.arrived,
            "given_back": sum(account.count(RETURNED) for account in accounts),
            "duplicates": sum(account.repeated for account in accounts),
            "sent_without_acknowledgement": sum(account.count(SENT) for account in plain),
            "of_which_arrived": sum(account.count(ARRIVED) for account in plain),
            "never_acknowledged": sum(account.count(SENT) - account.count(ACKED) for account in managed),
            "lost": len(lost),
            "out_of_order": len(disorder),
            "second_copies_behind": sum(account.excused for account in accounts),
            "wrong": len(wrong),
            "named": {"lost": lost[:_NAMED], "out_of_order": disorder[:_NAMED], "wrong": wrong[:_NAMED]},
        }
