"""A process that serves the command registry on a control socket and nothing else: `small_node.py DATA_DIR [--refuse]`.

It ends when `stop` has been asked for. With --refuse it says why it does not start, as the server does.
"""

import asyncio
import sys
from pathlib import Path

from tests.golden.memory import Node
from xmppd.admin.socket import ControlSocket


async def main(folder: Path) -> None:
    node = Node()
    folder.mkdir(parents=True, exist_ok=True)
    socket = ControlSocket(folder / "xmppd.sock", node.registry, node=node.server.node)
    await socket.start()
    while not node.server.asked:
        await asyncio.sleep(0.01)
    await socket.close()


if __name__ == "__main__":
    if "--refuse" in sys.argv:
        sys.exit("etc/xmppd.yml: hots: unknown option. Did you mean hosts?")
    asyncio.run(main(Path(sys.argv[1])))
