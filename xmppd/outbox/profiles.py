"""The forms in which other servers' modules tell web servers of messages, for web servers that were written for them.

Each has the fields of the module it is named after. What those got wrong is right here: values are escaped, and a body
in several languages is one text. With `confidential` the text is left out. No I/O.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, get_args
from urllib.parse import urlencode

from xmppd.outbox.messages import Message, json_object, to_json
from xmppd.protocol.jid import JID
from xmppd.sender.forms import timestamp

Profile = Literal["json", "codepond", "codepond_json", "zeropush", "kadekm", "rbt", "mongoose"]
PROFILES: Final[tuple[Profile, ...]] = get_args(Profile)
FORM: Final = "application/x-www-form-urlencoded"
JSON: Final = "application/json"


@dataclass(frozen=True, slots=True)
class Posted:
    """What a request consists of."""

    content_type: str
    payload: bytes
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class About:
    """What a form may say beside the message: the id of the event, whose message it is, the node's label, and the token
    that the web server expects ("": none)."""

    id: str
    host: str
    node: str
    token: str = ""


def posted(profile: Profile, message: Message, about: About) -> Posted:
    """A message in that form."""
    return _MAKERS[profile](message, about)


def _json(message: Message, about: About) -> Posted:
    payload = json_object(message, id=about.id, host=about.host, node=about.node)
    return Posted(JSON, payload, _bearer(about))


def _codepond(message: Message, about: About) -> Posted:
    """mod_offline_http_post"""
    return _form(_codepond_fields(message, "body"), _plain_token(about))


def _codepond_json(message: Message, about: About) -> Posted:
    """Its variant with JSON, for users who have logged out."""
    headers = (*_plain_token(about), ("Logged-Out", "true"))
    return Posted(JSON, to_json(_codepond_fields(message, "message")), headers)


def _codepond_fields(message: Message, body: str) -> dict[str, str]:
    fields = {
        "to": _user(message.recipient),
        "from": _user(message.sender),
        "vhost": message.recipient.domain,
        body: message.text,
        "messageId": message.stanza.id,
    }
    return _told(fields, body, message)


def _zeropush(message: Message, about: About) -> Posted:
    """mod_interact, mod_zeropush: the token is a field."""
    fields = {
        "server": message.recipient.domain,
        "from": _user(message.sender),
        "to": _user(message.recipient),
        "body": message.text,
        "badge": "+1",
        "sound": "default",
        "auth_token": about.token,
    }
    return _form(_told(fields, "body", message))


def _kadekm(message: Message, about: About) -> Posted:
    """mod_offline_post_log; its user and password (Basic) stand in the URL."""
    value: dict[str, object] = {
        "from": _parts(message.sender),
        "to": _parts(message.recipient),
        "message": message.text,
        "timestamp": timestamp(message.at, "T"),
        "xurls": message.urls,
    }
    if message.confidential:
        del value["message"], value["xurls"]
    return Posted(JSON, to_json(value), _bearer(about))


def _rbt(message: Message, about: About) -> Posted:
    """mod_webhook"""
    fields = {
        "from": _user(message.sender),
        "to": _user(message.recipient),
        "message_id": message.stanza.id,
        "body": message.text,
    }
    return _form(_told(fields, "body", message), _plain_token(about))


def _mongoose(message: Message, about: About) -> Posted:
    """mod_event_pusher_http"""
    fields = {
        "author": _user(message.sender),
        "server": message.recipient.domain,
        "receiver": _user(message.recipient),
        "message": message.text,
    }
    return _form(_told(fields, "message", message), _bearer(about))


_MAKERS: Final[dict[Profile, Callable[[Message, About], Posted]]] = {
    "json": _json,
    "codepond": _codepond,
    "codepond_json": _codepond_json,
    "zeropush": _zeropush,
    "kadekm": _kadekm,
    "rbt": _rbt,
    "mongoose": _mongoose,
}


def _form(fields: dict[str, str], headers: tuple[tuple[str, str], ...] = ()) -> Posted:
    return Posted(FORM, urlencode(fields).encode(), headers)


def _told(fields: dict[str, str], text: str, message: Message) -> dict[str, str]:
    """Without the text, where that is confidential."""
    return {name: value for name, value in fields.items() if not (message.confidential and name == text)}


def _user(jid: JID) -> str:
    return jid.local or jid.domain


def _parts(jid: JID) -> dict[str, str]:
    return {"username": jid.local, "server": jid.domain, "resource": jid.resource}


def _plain_token(about: About) -> tuple[tuple[str, str], ...]:
    return (("Authorization", about.token),) if about.token else ()


def _bearer(about: About) -> tuple[tuple[str, str], ...]:
    return (("Authorization", f"Bearer {about.token}"),) if about.token else ()
