"""The outbox: events for web servers, kept in the database until they have been taken.

An event is written in the same commit as what it is about, and sent by the node that wrote it; when that one dies,
another one goes on. At least once: a receiver knows a repetition by its `Idempotency-Key`.
"""

from xmppd.outbox.backoff import Retry
from xmppd.outbox.event import Event, conversation, repetition
from xmppd.outbox.file import FileSink
from xmppd.outbox.messages import Message, json_object
from xmppd.outbox.outbox import Outbox, SinkStatus
from xmppd.outbox.profiles import PROFILES, About, Posted, Profile, posted
from xmppd.outbox.runner import Settings
from xmppd.outbox.sink import HttpSink, wrong_with
from xmppd.outbox.table import TableSink
from xmppd.sender.forms import XML_LANG, Form, hidden, text_of, timestamp
from xmppd.sender.signature import sign, verify
from xmppd.sender.target import DONE, Answer, HttpTarget, ulid

__all__ = [
    "DONE",
    "PROFILES",
    "XML_LANG",
    "About",
    "Answer",
    "Event",
    "FileSink",
    "Form",
    "HttpSink",
    "HttpTarget",
    "Message",
    "Outbox",
    "Posted",
    "Profile",
    "Retry",
    "Settings",
    "SinkStatus",
    "TableSink",
    "conversation",
    "hidden",
    "json_object",
    "posted",
    "repetition",
    "sign",
    "text_of",
    "timestamp",
    "ulid",
    "verify",
    "wrong_with",
]
