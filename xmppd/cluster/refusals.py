"""The exit codes of the cluster's refusals (docs/exit-codes.md)."""

from typing import Final

from xmppd.errors import CommandError

ALREADY_JOINED: Final = 17
UNREACHABLE: Final = 18
WRONG_COOKIE: Final = 19
OTHER_VERSION: Final = 20
OTHER_HOSTS: Final = 21
SELF: Final = 22
NODE_LOCAL_DATABASE: Final = 23
OTHER_DATABASE: Final = 24
REMOVED: Final = 25
NOT_CONVERGED: Final = 26
NO_SUCH_NODE: Final = 27
NAME_TAKEN: Final = 28


class Refusal(CommandError):
    """Why a node is not joined, as the operator is told; `check` names the test of `test_node` that it fails."""

    def __init__(self, text: str, code: int, check: str = "") -> None:
        super().__init__(text, code)
        self.check = check
