"""Entity capabilities (XEP-0115) of the hosts: a hash in the stream features says what service discovery would say."""

import base64
import hashlib
from typing import Final
from xml.sax.saxutils import quoteattr

from xmppd.events import HANDLED, DiscoNodeAsking, FeaturesOffering, Handled
from xmppd.module_api import DiscoInfo, DiscoService, Module, hook
from xmppd.protocol import ns

NODE: Final = "urn:xmppd:server"  # which software; with the hash it names a set of features


class Caps(Module[object]):
    xeps = {115: "1.6.0"}
    features = (ns.CAPS,)
    requires = ("disco",)

    @hook(FeaturesOffering)
    def offer(self, event: FeaturesOffering) -> None:
        """Made anew for each stream: what modules declare changes when one is loaded, and a login costs more than
        this hash."""
        if event.authenticated:
            ver = verification(self._disco().host_info())
            event.features.append(
                f"<c xmlns='{ns.CAPS}' hash='sha-1' node={quoteattr(NODE)} ver={quoteattr(ver)}/>".encode()
            )

    @hook(DiscoNodeAsking)
    def explain(self, event: DiscoNodeAsking) -> Handled | None:
        """XEP-0115 6.2: what is behind the hash, as long as it holds."""
        node, _, ver = event.node.partition("#")
        if event.target.local or event.kind != "info" or node != NODE:
            return None
        info = self._disco().host_info()
        if ver != verification(info):
            return None
        event.answer = self._disco().info_xml(info, event.node)
        return HANDLED

    def _disco(self) -> DiscoService:
        found: DiscoService = self.service(DiscoService)  # type: ignore[type-abstract]
        return found


def verification(info: DiscoInfo) -> str:
    """XEP-0115 5.1. Sorted by the bytes of UTF-8, which is the order of the characters."""
    parts = [f"{category}/{type}//{name}" for category, type, name in sorted(info.identities)]
    parts += sorted(info.features)
    for form_type, listed in sorted(info.forms):
        parts.append(form_type)
        for name, values in sorted(listed):
            parts += [name, *sorted(values)]
    text = "".join(f"{part}<" for part in parts)
    return base64.b64encode(hashlib.sha1(text.encode(), usedforsecurity=False).digest()).decode()
