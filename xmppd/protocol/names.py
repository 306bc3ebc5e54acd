"""Element, attribute, prefix and namespace names that ordinary clients use.

libxml2 remembers every name it has seen for the life of the process. These are remembered anyway, so they do not count
against the novel names a stream may bring (`Limits.names`). Not a list of what is supported.
"""

from typing import Final

_BY_NAMESPACE: Final[dict[str, str]] = {
    "http://etherx.jabber.org/streams": "stream features error",
    "jabber:client": ("message presence iq body subject thread status show priority error"),
    "urn:ietf:params:xml:ns:xmpp-tls": "starttls proceed failure required",
    "urn:ietf:params:xml:ns:xmpp-sasl": "auth response challenge success failure abort mechanisms mechanism",
    "urn:ietf:params:xml:ns:xmpp-bind": "bind resource jid",
    "urn:ietf:params:xml:ns:xmpp-session": "session optional",
    "urn:ietf:params:xml:ns:xmpp-stanzas": (
        "text bad-request conflict feature-not-implemented forbidden gone internal-server-error item-not-found"
        " jid-malformed not-acceptable not-allowed not-authorized policy-violation recipient-unavailable redirect"
        " registration-required remote-server-not-found remote-server-timeout resource-constraint"
        " service-unavailable subscription-required undefined-condition unexpected-request"
    ),
    "urn:ietf:params:xml:ns:xmpp-streams": "text",
    "jabber:iq:roster": "query item group",
    "jabber:iq:private": "query",
    "jabber:iq:version": "query name version os",
    "jabber:iq:last": "query",
    "jabber:iq:register": "query username password remove registered instructions email",
    "http://jabber.org/protocol/disco#info": "query identity feature",
    "http://jabber.org/protocol/disco#items": "query item",
    "http://jabber.org/protocol/caps": "c",
    "http://jabber.org/protocol/chatstates": "active composing paused inactive gone",
    "http://jabber.org/protocol/commands": "command actions note",
    "http://jabber.org/protocol/muc": "x history password",
    "http://jabber.org/protocol/muc#user": "x item status actor reason invite decline",
    "http://jabber.org/protocol/muc#owner": "query destroy",
    "http://jabber.org/protocol/muc#admin": "query item",
    "http://jabber.org/protocol/pubsub": "pubsub publish item items retract subscribe subscription publish-options",
    "http://jabber.org/protocol/pubsub#event": "event items item retract",
    "http://jabber.org/protocol/xhtml-im": "html",
    "jabber:x:data": "x field value option title instructions",
    "jabber:x:oob": "x url desc",
    "jabber:x:delay": "x",
    "jabber:x:event": "x id composing offline delivered displayed",
    "jabber:x:expire": "x",
    "jabber:x:conference": "x",
    "storage:bookmarks": "storage conference url",
    "vcard-temp": "vCard FN N FAMILY GIVEN MIDDLE NICKNAME PHOTO TYPE BINVAL EMAIL USERID URL BDAY ORG ORGNAME TITLE"
    " ROLE TEL NUMBER ADR DESC JABBERID",
    "vcard-temp:x:update": "x photo",
    "urn:xmpp:ping": "ping",
    "urn:xmpp:time": "time tzo utc",
    "urn:xmpp:delay": "delay",
    "urn:xmppd:delivery:0": "query message",
    "urn:xmpp:receipts": "request received",
    "urn:xmpp:hints": "store no-store no-permanent-store no-copy",
    "urn:xmpp:sm:3": "enable enabled resume resumed failed r a sm",
    "urn:xmpp:carbons:2": "enable disable private sent received",
    "urn:xmpp:forward:0": "forwarded",
    "urn:xmpp:mam:2": "query prefs result fin",
    "urn:xmpp:sid:0": "stanza-id origin-id",
    "urn:xmpp:blocking": "block unblock blocklist item",
    "urn:xmpp:csi:0": "active inactive",
    "urn:xmpp:chat-markers:0": "markable received displayed acknowledged",
    "urn:xmpp:message-correct:0": "replace",
    "urn:xmpp:reactions:0": "reactions reaction",
    "urn:xmpp:avatar:metadata": "metadata info",
    "urn:xmpp:avatar:data": "data",
    "urn:xmpp:eme:0": "encryption",
    "eu.siacs.conversations.axolotl": "encrypted header key iv payload list device",
    "urn:xmpp:push:0": "enable disable",
    "urn:xmpp:sasl:2": "authenticate response challenge success failure continue initial-response user-agent",
    "urn:xmpp:bind:0": "bind tag bound",
}

_OTHERS: Final = (
    "to from id type version mechanism name jid subscription ask ver node var category hash stamp code by lang h"
    " resume max location previd xmlns stream xml affiliation role nick reason queryid code label value"
    " autojoin seconds maxchars maxstanzas since namespace approved xsi xs"
    " {http://www.w3.org/XML/1998/namespace}lang"
)

KNOWN_NAMES: Final[frozenset[str]] = frozenset(
    [f"{{{uri}}}{name}" for uri, names in _BY_NAMESPACE.items() for name in names.split()]
    + list(_BY_NAMESPACE)
    + _OTHERS.split()
)
