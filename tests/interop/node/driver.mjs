// One @xmpp/client, driven from outside: a JSON command on each line of standard input, a JSON event on each line of
// standard output. Commands: {op: "start", service, domain, username, password, resource}, {op: "send", xml},
// {op: "drop"} (the socket dies), {op: "stop"}. Events: {event, data}.
import { createInterface } from "node:readline";

import { client } from "@xmpp/client";
import parse from "@xmpp/xml/lib/parse.js";

let xmpp;
const sending = new Set();

function tell(event, data) {
  process.stdout.write(JSON.stringify({ event, data }) + "\n");
}

const operations = {
  start({ op, ...options }) {
    xmpp = client(options);
    xmpp.reconnect.delay = 50;
    xmpp.on("online", (address) => tell("online", address.toString()));
    xmpp.on("stanza", (stanza) => tell("stanza", stanza.toString()));
    xmpp.on("error", (error) => tell("error", String(error)));
    xmpp.streamManagement.on("resumed", () => tell("resumed"));
    xmpp.on("disconnect", () => tell("disconnect"));
    xmpp.on("offline", () => tell("offline"));
    xmpp.start().catch((error) => tell("error", String(error)));
  },
  async send({ xml }) {
    const sent = xmpp.send(parse(xml));
    sending.add(sent);
    await sent.finally(() => sending.delete(sent));
  },
  async drop() {
    await Promise.allSettled(sending); // the library's own queue has them
    (xmpp.socket.socket ?? xmpp.socket).destroy();
  },
  async stop() {
    await xmpp.stop();
    process.exit(0);
  },
};

for await (const line of createInterface({ input: process.stdin })) {
  const command = JSON.parse(line);
  Promise.resolve(operations[command.op](command)).catch((error) => tell("error", String(error)));
}
