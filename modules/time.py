"""Entity time (XEP-0202): what the server's clock says."""

import time

from xmppd.module_api import IqRequest, Module, iq
from xmppd.protocol import ns


class EntityTime(Module[object]):
    xeps = {202: "2.0", 82: "1.1"}
    features = (ns.TIME,)

    @iq("get", ns.TIME, "time", at="host")
    def time(self, request: IqRequest) -> bytes:
        """UTC, and the offset of the server's own zone."""
        now = self.clock()
        utc = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now))
        minutes = (time.localtime(now).tm_gmtoff or 0) // 60
        sign = "-" if minutes < 0 else "+"
        hours, minutes = divmod(abs(minutes), 60)
        return f'<time xmlns="{ns.TIME}"><tzo>{sign}{hours:02d}:{minutes:02d}</tzo><utc>{utc}</utc></time>'.encode()
