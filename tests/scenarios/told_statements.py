"""A node that writes down each SQL statement, a line of JSON: (task, statement).

It goes in front of the command of a node: `python -m tests.scenarios.told_statements FILE python -m xmppd ...`.
"""

import asyncio
import json
import runpy
import sys
from typing import Any

from sqlalchemy import Engine, event


def tell(path: str) -> None:
    file = open(path, "a", buffering=1)  # noqa: SIM115 - for as long as the process lives

    @event.listens_for(Engine, "before_cursor_execute")
    def _(connection: Any, cursor: Any, statement: str, *ignored: Any) -> None:
        try:
            task = asyncio.current_task()
        except RuntimeError:
            task = None
        print(json.dumps((task.get_name() if task else "", " ".join(statement.split()))), file=file)


if __name__ == "__main__":
    tell(sys.argv[1])
    sys.argv = ["xmppd", *sys.argv[5:]]
    runpy.run_module("xmppd", run_name="__main__", alter_sys=True)
