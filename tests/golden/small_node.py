"""A process that serves the command registry on a control socket and nothing else: `small_node.py DATA_DIR [--refuse]`.

It ends when `stop` has been asked for. With --refuse it says why it does not start, as the server does.
"""

import sys
from pathlib import Path

import uvloop

from tests.golden.memory import Node
from xmppd.admin.socket import ControlSocket


async def main(folder: str) -> None:
    node = Node()
    socket = ControlSocket(Path(folder, "xmppd.sock"), node.registry, node=node.server.node)
    await socket.start()
    await node.server.asked_to_stop.wait()
    await socket.close()


if __name__ == "__main__":
    if "--refuse" in sys.argv:
        sys.exit("etc/xmppd.yml: hots: unknown option. Did you mean hosts?")
    uvloop.run(main(sys.argv[1]))
