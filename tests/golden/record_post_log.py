"""Record what ejabberd 23.01 with its module for posting messages sends to a web server: post_log-23.01.json.

Run it where Debian's `ejabberd` and `ejabberd-mod-post-log` are installed (the service need not run, and is not
touched):

    python tests/golden/record_post_log.py

It starts its own node as record_ejabberdctl.py does, a web server on the loopback interface, sends the corpus below
through a client, and writes down each request: headers as they came, body as it came.
"""

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import record_ejabberdctl
from record_ejabberdctl import Client, Node

HERE = Path(__file__).parent
TARGET = HERE / "post_log-23.01.json"
ROMEO, JULIET = "romeo@localhost", "juliet@localhost"

# What the client sends, in this order. A name is for people; `{long}` stands for 60,000 letters.
CORPUS: list[tuple[str, str]] = [
    ("chat", f"<message type='chat' to='{JULIET}' id='m1'><body>Wherefore art thou?</body></message>"),
    ("to a resource", f"<message type='chat' to='{JULIET}/balcony' id='m2'><body>here</body></message>"),
    ("groupchat", "<message type='groupchat' to='room@conference.localhost' id='m3'><body>all</body></message>"),
    ("no body", f"<message type='chat' to='{JULIET}' id='m4'><subject>s</subject></message>"),
    ("empty body", f"<message type='chat' to='{JULIET}' id='m5'><body/></message>"),
    ("a blank", f"<message type='chat' to='{JULIET}' id='m6'><body> </body></message>"),
    (
        "two languages",
        f"<message type='chat' to='{JULIET}' id='m7'><body>hello</body><body xml:lang='de'>hallo</body></message>",
    ),
    (
        "two languages, the first one empty",
        f"<message type='chat' to='{JULIET}' id='m8'><body/><body xml:lang='de'>hallo</body></message>",
    ),
    ("normal", f"<message to='{JULIET}' id='m9'><body>normal</body></message>"),
    ("headline", f"<message type='headline' to='{JULIET}' id='m10'><body>news</body></message>"),
    ("error", f"<message type='error' to='{JULIET}' id='m11'><body>no</body><error type='cancel'/></message>"),
    ("an unknown type", f"<message type='whisper' to='{JULIET}' id='m12'><body>psst</body></message>"),
    (
        "receipt",
        f"<message type='chat' to='{JULIET}' id='m13'><received xmlns='urn:xmpp:receipts' id='x'/></message>",
    ),
    (
        "chat state",
        f"<message type='chat' to='{JULIET}'><active xmlns='http://jabber.org/protocol/chatstates'/></message>",
    ),
    ("emoji", f"<message type='chat' to='{JULIET}' id='m14'><body>😀 👩‍👩‍👧 ü</body></message>"),
    (
        "end of a CDATA",
        f"<message type='chat' to='{JULIET}' id='m15'><body>a ]]&gt; b &lt;c&gt; &amp; \"d\" 'e'</body></message>",
    ),
    ("CDATA", f"<message type='chat' to='{JULIET}' id='m16'><body><![CDATA[<b>&amp;]]></body></message>"),
    ("line ends", f"<message type='chat' to='{JULIET}' id='m17'><body>one\ntwo\tthree&#13;four</body></message>"),
    ("60 kB", f"<message type='chat' to='{JULIET}' id='m18'><body>{{long}}</body></message>"),
    (
        "a support client",
        f'<message type=\'chat\' to=\'{JULIET}\' id=\'m19\'><body>{{"type":"message","data":{{"content":"hi"}}}}</body>'
        "<request xmlns='urn:xmpp:receipts'/></message>",
    ),
    ("an id of one blank", f"<message type='chat' to='{JULIET}' id=' '><body>typing</body></message>"),
    ("no id", f"<message type='chat' to='{JULIET}'><body>no id</body></message>"),
    ("to oneself", f"<message type='chat' to='{ROMEO}' id='m20'><body>note</body></message>"),
    ("no recipient", "<message type='chat' id='m21'><body>to whom?</body></message>"),
    ("elsewhere", "<message type='chat' to='nurse@elsewhere.example' id='m22'><body>far</body></message>"),
    ("mixed case", "<message type='chat' to='JULIET@LocalHost/Balcony' id='m23'><body>case</body></message>"),
    ("no such user", "<message type='chat' to='nobody@localhost' id='m24'><body>anybody?</body></message>"),
    ("the host", "<message type='chat' to='localhost' id='m25'><body>host</body></message>"),
    ("the same id again", f"<message type='chat' to='{JULIET}' id='m1'><body>Wherefore art thou?</body></message>"),
    ("its own from", f"<message type='chat' from='{ROMEO}/orchard' to='{JULIET}' id='m26'><body>from</body></message>"),
    (
        "an unknown child",
        f"<message type='chat' to='{JULIET}' id='m27' xml:lang='en'><body>x</body><thread>t</thread>"
        "<a xmlns='urn:example:a' b='c'><d xmlns='urn:example:d'/></a></message>",
    ),
    (
        "a delay, and an error inside",
        f"<message type='chat' to='{JULIET}' id='m28'><body>y</body>"
        "<delay xmlns='urn:xmpp:delay' from='x@y.example' stamp='2020-01-01T00:00:00Z'/></message>",
    ),
    (
        "carbon-like",
        f"<message type='chat' to='{JULIET}' id='m29'><body>c</body><sent xmlns='urn:xmpp:carbons:2'>"
        "<forwarded xmlns='urn:xmpp:forward:0'><message xmlns='jabber:client' type='chat' to='a@b.example'>"
        "<body>inner</body></message></forwarded></sent></message>",
    ),
    (
        "no store",
        f"<message type='chat' to='{JULIET}' id='m30'><body>z</body><no-store xmlns='urn:xmpp:hints'/></message>",
    ),
    (
        "subject and thread first",
        f"<message xml:lang='de' foo='bar' id='m31' type='chat' to='{JULIET}'><thread parent='p'>t</thread>"
        "<subject>s1</subject><subject xml:lang='fr'>s2</subject><x xmlns='urn:example:x' xml:lang='it'>u</x>"
        "<body xml:lang='de' foo='bar'>b</body> text <y xmlns='urn:example:y' a=\"&lt;'&quot;\"/></message>",
    ),
    (
        "prefixes",
        f"<message xmlns:p='urn:example:p' type='chat' to='{JULIET}' id='m32'><p:q p:r='1'><s/></p:q><body>b</body>"
        "</message>",
    ),
    ("the last", f"<message type='chat' to='{JULIET}' id='last'><body>last</body></message>"),
]
LONG = "abcdefghij" * 6000


class Sink:
    """A web server that keeps what it is sent."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.last = asyncio.Event()

    async def start(self) -> int:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
            except (asyncio.IncompleteReadError, asyncio.CancelledError):
                break
            line, *headers = head.rstrip("\r\n").split("\r\n")
            pairs = [header.split(": ", 1) for header in headers]
            length = next(int(value) for name, value in pairs if name.lower() == "content-length")
            body = (await reader.readexactly(length)).decode()
            self.requests.append({"line": line, "headers": pairs, "body": body})
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            if "id='last'" in body or 'id="last"' in body:
                self.last.set()
        writer.close()


async def record(node: Node) -> dict[str, Any]:
    sink = Sink()
    port = await sink.start()
    node.write_config()
    path = node.folder / "ejabberd.yml"
    path.write_text(
        path.read_text().replace(
            "modules: {", f'modules: {{mod_post_log: {{url: "http://127.0.0.1:{port}/messages"}}, mod_muc: {{}}, '
        )
    )
    await asyncio.to_thread(node.start)
    for user in ("romeo", "juliet"):
        done = await asyncio.to_thread(node.ctl, "register", user, "localhost", "pw")
        assert done.returncode == 0, done
    romeo, juliet = Client("romeo", "orchard"), Client("juliet", "balcony")
    for client in (romeo, juliet):
        await client.login(node.port, "pw")
        await client.ask("<presence/>", "<presence")
    posts: dict[str, list[dict[str, Any]]] = {}
    for name, stanza in CORPUS:
        before = len(sink.requests)
        romeo.writer.write(stanza.replace("{long}", LONG).encode())
        # what is not posted never comes: the answer to a ping says that the message has been dealt with
        await romeo.ask("<iq type='get' id='ping' to='localhost'><ping xmlns='urn:xmpp:ping'/></iq>", "id='ping'")
        await asyncio.sleep(0.3)
        posts[name] = sink.requests[before:]
    await asyncio.wait_for(sink.last.wait(), 10)
    romeo.close()
    juliet.close()
    cases = [{"name": name, "sent": stanza, "posts": posts[name]} for name, stanza in CORPUS]
    text = json.dumps({"ejabberd": "23.01", "long": "60,000 letters: abcdefghij, again and again", "cases": cases})
    return dict(json.loads(text.replace(LONG, "{long}").replace(f"127.0.0.1:{port}", "{sink}")))


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="xr", ignore_cleanup_errors=True) as folder:
        node = Node(Path(folder))
        try:
            node.prepare()
            found = asyncio.run(record(node))
        finally:
            node.end()
    TARGET.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    print(sum(len(case["posts"]) for case in found["cases"]), "requests")


assert record_ejabberdctl.WRAPPER.exists(), "Debian's ejabberd is not installed"
if __name__ == "__main__":
    main()
