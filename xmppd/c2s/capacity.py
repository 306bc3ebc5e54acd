"""How many clients there is room for: each is an open file, and the node keeps some for itself.

Without that, strangers who connect and do nothing could keep the node from its database and its operators out.
"""

import resource
from typing import Final

_MOST: Final = 1 << 20  # files; more are not asked for where the machine sets no limit
_OWN: Final = 192  # for the database, HTTP, other nodes, xmppctl, the log


def room() -> int:
    """Raise the process's limit on open files as far as it may; how many clients fit then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, _MOST)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
        except (OSError, ValueError):
            pass  # a container may forbid even that
    files = _MOST if soft == resource.RLIM_INFINITY else min(soft, _MOST)
    return files - min(_OWN, files // 2)
