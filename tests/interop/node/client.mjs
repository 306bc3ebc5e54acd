// A client made with @xmpp/client, told what to do line by line on standard input and telling what happens on standard
// output, both as JSON. Requests: {"do": "start" | "send" | "ask" | "stop" | "drop", ...}; events: {"event": ..., ...}.
// A stanza is [name, attributes, ...children]; a child may be a text.

import { createInterface } from "node:readline";
import { client, xml } from "@xmpp/client";

const [service, domain, username, password, resource] = process.argv.slice(2);
const xmpp = client({ service, domain, username, password, resource });
const tell = (event, more = {}) => process.stdout.write(JSON.stringify({ event, ...more }) + "\n");

const build = (value) => (typeof value === "string" ? value : xml(value[0], value[1], ...value.slice(2).map(build)));
const plain = (element) =>
  typeof element === "string" ? element : [element.name, element.attrs, ...element.children.map(plain)];

xmpp.reconnect.delay = 50;
xmpp.on("error", (error) => tell("error", { name: error.name, text: error.message }));
xmpp.on("status", (status) => tell("status", { status }));
xmpp.on("online", (address) => tell("online", { jid: address.toString() }));
xmpp.on("stanza", (stanza) => tell("stanza", { stanza: plain(stanza) }));

const actions = {
  start: () => xmpp.start(),
  stop: () => xmpp.stop(),
  send: ({ stanza }) => xmpp.send(build(stanza)),
  ask: async ({ id, stanza }) => tell("answer", { id, stanza: plain(await xmpp.iqCaller.request(build(stanza))) }),
  drop: () => xmpp.socket.destroy?.() ?? xmpp.socket.socket.destroy(),
};

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line);
  try {
    await actions[request.do](request);
    tell("done", { what: request.do });
  } catch (error) {
    tell("failed", { what: request.do, condition: error.condition ?? null, text: error.message });
  }
}
process.exit(0);
