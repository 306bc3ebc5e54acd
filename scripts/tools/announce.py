"""Tell the person who started `scripts/run` what to do next, once the server serves.

    announce.py DATA_DIR PID

Waits until process PID holds DATA_DIR and serves, prints, and ends. Ends silently when that process is gone. Standard
library only.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

PAUSE = 0.1  # s


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def wait_until_ready(data_dir: Path, pid: int) -> dict[str, Any] | None:
    while alive(pid):
        try:
            # A starting server removes the ready.json that a killed one left behind before it writes its pid.
            if int((data_dir / "pid").read_text()) == pid:
                ready: dict[str, Any] = json.loads((data_dir / "ready.json").read_text())
                return ready
        except (OSError, ValueError):
            pass  # not there yet
        time.sleep(PAUSE)
    return None


def port_of(ready: dict[str, Any], *, tls: bool) -> int | None:
    for listener in ready.get("listen", []):
        if listener.get("module") == "c2s" and bool(listener.get("tls")) is tls:
            return int(listener["port"])
    return None


def text(ready: dict[str, Any], data_dir: Path) -> str:
    host = ready["hosts"][0]
    beside = Path(sys.executable).with_name("xmppctl")
    ctl = f"{beside if beside.exists() else 'xmppctl'} --data-dir {data_dir}"
    doors = []
    if starttls := port_of(ready, tls=False):
        doors.append(f"port {starttls} (STARTTLS)")
    if direct := port_of(ready, tls=True):
        doors.append(f"port {direct} (direct TLS)")
    return "\n".join(
        [
            "",
            f"xmppd serves {', '.join(ready['hosts'])}.",
            "",
            "  Add an account, in a second terminal (without the password it is read from standard input):",
            f"      {ctl} register romeo {host} PASSWORD",
            "",
            "  Connect with any XMPP client:",
            f"      address romeo@{host}, server 127.0.0.1, {' or '.join(doors) or 'no c2s port is configured'}",
            f"      The certificate is self-signed: accept it, or trust {data_dir / 'certs' / host}.pem",
            "",
            f"  Everything else: {ctl} help",
            "  Stop: Ctrl-C",
            "",
        ]
    )


def main() -> None:
    data_dir, pid = Path(sys.argv[1]), int(sys.argv[2])
    if ready := wait_until_ready(data_dir, pid):
        print(text(ready, data_dir), flush=True)


if __name__ == "__main__":
    main()
