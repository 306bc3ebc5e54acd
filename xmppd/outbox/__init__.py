"""The outbox: events for web servers, kept in the database until they have been taken.

An event is written in the same commit as what it is about, and sent by the node that wrote it; when that one dies,
another one goes on. At least once: a receiver knows a repetition by its `Idempotency-Key`.
"""

from xmppd.outbox.backoff import Retry
from xmppd.outbox.event import Event, conversation, repetition, ulid
from xmppd.outbox.file import FileSink
from xmppd.outbox.outbox import Outbox, SinkStatus
from xmppd.outbox.runner import Settings
from xmppd.outbox.signature import sign, verify
from xmppd.outbox.sink import DONE, Answer, HttpSink, HttpTarget
from xmppd.outbox.table import TableSink

__all__ = [
    "DONE",
    "Answer",
    "Event",
    "FileSink",
    "HttpSink",
    "HttpTarget",
    "Outbox",
    "Retry",
    "Settings",
    "SinkStatus",
    "TableSink",
    "conversation",
    "repetition",
    "sign",
    "ulid",
    "verify",
]
