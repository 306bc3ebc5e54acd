"""The errors the rooms of the server hand to each other."""

# RFC 6120 8.3.3: each defined stanza error condition with the type we send it with.
STANZA_ERROR_TYPES: dict[str, str] = {
    "bad-request": "modify",
    "conflict": "cancel",
    "feature-not-implemented": "cancel",
    "forbidden": "auth",
    "gone": "cancel",
    "internal-server-error": "cancel",
    "item-not-found": "cancel",
    "jid-malformed": "modify",
    "not-acceptable": "modify",
    "not-allowed": "cancel",
    "not-authorized": "auth",
    "policy-violation": "modify",
    "recipient-unavailable": "wait",
    "redirect": "modify",
    "registration-required": "auth",
    "remote-server-not-found": "cancel",
    "remote-server-timeout": "wait",
    "resource-constraint": "wait",
    "service-unavailable": "cancel",
    "subscription-required": "auth",
    "undefined-condition": "cancel",
    "unexpected-request": "wait",
}


class XmppdError(Exception):
    """Base of every error the server raises on purpose."""


class ConfigError(XmppdError):
    """One or more faults in the configuration; each line of `problems` names path, value and remedy."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class StanzaError(XmppdError):
    """The sender of a stanza is told (RFC 6120 8.3): a condition, its type and a text for humans. `application`: an
    application-specific condition (8.3.4), as XML."""

    def __init__(self, condition: str, text: str = "", *, type: str | None = None, application: bytes = b"") -> None:
        super().__init__(f"{condition}: {text}" if text else condition)
        self.condition = condition
        self.text = text
        self.type = type or STANZA_ERROR_TYPES[condition]
        self.application = application


class StreamError(XmppdError):
    """The stream is ended with a condition of RFC 6120 4.9.3; `application` is an element that says more."""

    def __init__(self, condition: str, text: str = "", *, application: bytes = b"") -> None:
        super().__init__(f"{condition}: {text}" if text else condition)
        self.condition = condition
        self.text = text
        self.application = application


class JidError(XmppdError):
    """A string that is no address (RFC 7622)."""


class StorageError(XmppdError):
    """The database did not do what was asked; the caller decides what its user is told."""


class StorageUnavailable(StorageError):
    """The database is away, locked, full or too slow: trying again later may work."""


class SchemaTooNew(StorageError):
    """The database was made by a newer version of the server."""


class DataFolderInUse(XmppdError):
    """Another process already serves from this data folder."""

    def __init__(self, path: str, pid: int | None) -> None:
        held = f"process {pid}" if pid else "another process"
        super().__init__(f"{path} is in use by {held}")
        self.path = path
        self.pid = pid


class CommandError(XmppdError):
    """An admin command that could not be done: a text for the operator and an exit code (docs/exit-codes.md)."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.text = text
        self.code = code


class NodeIdTaken(XmppdError):
    """Another process serves as this very node: the data folder was copied."""


class NodeIdInUse(NodeIdTaken):
    """It did so when this one started. `last_seen` by the database's clock."""

    def __init__(self, name: str, address: str, last_seen: float, lease_left: float) -> None:
        where = f"{name} at {address}" if address else name
        super().__init__(
            f"two nodes claim one node id: {where} serves with it, {max(lease_left, 0):.0f} s of its lease are left. "
            "This data folder is a copy: make it a node of its own with `xmppd --new-identity`"
        )
        self.last_seen = last_seen
        self.lease_left = lease_left  # seconds until that process counts as gone


class NodeRemoved(XmppdError):
    """A node that was removed from its cluster for good."""


class WrongDatabase(XmppdError):
    """The database belongs to another cluster than the node."""


class NodeNameTaken(XmppdError):
    """Two members of a cluster would have one name."""


class NodeUnreachable(XmppdError):
    """Another node of the cluster did not answer: it is down, cut off, or too slow."""


class CallRefused(XmppdError):
    """Another node of the cluster answered a call with a refusal: its text and exit code."""

    def __init__(self, text: str, code: int = 1) -> None:
        super().__init__(text)
        self.text = text
        self.code = code
