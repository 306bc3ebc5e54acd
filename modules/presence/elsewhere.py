"""Who is available on other nodes, and the question to them."""

from collections.abc import Callable, Iterable

from xmppd.module_api import Nodes, Sessions
from xmppd.protocol.jid import JID

Asked = dict[bytes, list[str]]  # by node: the bare JIDs of users who have available resources there


class Elsewhere:
    """`is_near` says of a bare JID whether it is a user of ours."""

    def __init__(self, nodes: Nodes, sessions: Sessions, is_near: Callable[[JID], bool]) -> None:
        self._nodes = nodes
        self._sessions = sessions
        self._is_near = is_near

    @property
    def exists(self) -> bool:
        """Whether there are other nodes."""
        return bool(self._nodes.others)

    def resources(self, users: Iterable[JID]) -> set[JID]:
        """The available resources of users there."""
        return {
            resource.jid
            for user in users
            if self._is_near(user)
            for resource in self._sessions.resources(user)
            if resource.node is not None and resource.priority is not None
        }

    def nodes_with(self, user: JID, only: str = "") -> set[bytes]:
        """The nodes with available resources of a user, or with that one."""
        return {
            resource.node
            for resource in self._sessions.resources(user)
            if resource.node is not None and resource.priority is not None and only in ("", resource.jid.resource)
        }

    def note(self, user: JID, asked: Asked) -> None:
        """Add a user to what is to be asked."""
        if self.exists:
            for node in self.nodes_with(user):
                asked.setdefault(node, []).append(user.bare)

    def ask(self, asker: JID, asked: Asked, only: str = "") -> None:
        """Have the presence of these users (or of one resource) sent to somebody; each node is asked once. `asked` is
        empty then."""
        for node, users in asked.items():
            self._nodes.cast("probe", [asker.full, users, only], (node,))
        asked.clear()
