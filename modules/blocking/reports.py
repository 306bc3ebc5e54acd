"""Reports of spam and abuse that come with a block (XEP-0377). No I/O."""

from dataclasses import dataclass
from typing import Final
from xml.sax.saxutils import escape, quoteattr

from lxml.etree import _Element

from xmppd.module_api import new_id
from xmppd.protocol import ns
from xmppd.protocol.jid import JID
from xmppd.protocol.stanza import Stanza, build, serialize

_REPORT: Final = f"{{{ns.REPORTING}}}report"
_TEXT: Final = f"{{{ns.REPORTING}}}text"
REASON_BYTES: Final = 255
_SIZE: Final = 16 << 10  # bytes of one report; of a longer one only the reason is kept


@dataclass(frozen=True, slots=True)
class Report:
    id: bytes
    created_at: float
    jid: str  # who is reported
    reason: str  # urn:xmpp:reporting:spam, urn:xmpp:reporting:abuse
    text: str  # the user's words, "" when there are none
    xml: bytes  # <report/> as it came: with the ids of messages, and what the user agrees to


def read_report(item: _Element, jid: JID, now: float) -> Report | None:
    """The report in an <item/>; None when there is none, or it gives no reason: the block is made all the same."""
    element = item.find(_REPORT)
    reason = "" if element is None else (element.get("reason") or "").strip()
    if element is None or not reason or len(reason.encode()) > REASON_BYTES:
        return None
    xml, text = serialize(element), (element.findtext(_TEXT) or "").strip()
    if len(xml) > _SIZE:
        xml, text = f'<report xmlns="{ns.REPORTING}" reason={quoteattr(reason)}/>'.encode(), ""
    return Report(new_id(), now, jid.full, reason, text, xml)


def notice(report: Report, user: JID, to: JID) -> Stanza:
    """What the people are told who look after the host."""
    lines = [f"{user.bare} reports {report.jid} ({report.reason})"]
    if report.text:
        lines.append(report.text)
    body = escape("\n".join(lines))
    inner = f"<subject>Report about {escape(report.jid)}</subject><body>{body}</body>".encode() + report.xml
    return build("message", {"type": "normal", "id": report.id.hex(), "from": user.domain, "to": to.full}, inner)
