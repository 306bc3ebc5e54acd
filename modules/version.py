"""Software version (XEP-0092)."""

import platform
from dataclasses import dataclass
from xml.sax.saxutils import escape

from xmppd.module_api import IqRequest, Module, iq
from xmppd.protocol import ns


@dataclass(frozen=True, slots=True)
class Config:
    show_os: bool = False  # the operating system too: convenient for attackers


class Version(Module[Config]):
    xeps = {92: "1.1"}
    features = (ns.VERSION,)

    @iq("get", ns.VERSION, "query", at="host")
    def version(self, request: IqRequest) -> bytes:
        """Name and version of this software."""
        system = f"<os>{escape(f'{platform.system()} {platform.release()}')}</os>" if self.config.show_os else ""
        version = escape(self.server.version)
        return f'<query xmlns="{ns.VERSION}"><name>xmppd</name><version>{version}</version>{system}</query>'.encode()
