// An observer: lists the sessions of the cluster, sends a message through the command API, and watches events.
// It speaks NATS' own protocol, without TLS (for loopback); docs/cluster-protocol.md explains the subjects.
//   node observer.js HOST PORT NAME SECRET_FILE [FROM TO TEXT]
const [host, port, name, secretFile, from, to, text] = process.argv.slice(2)
const pass = require('fs').readFileSync(secretFile, 'utf8').split('\n')[0].trim()
const socket = require('net').connect({ host, port: Number(port) })
const handlers = [] // by subscription
let buffer = Buffer.alloc(0)

socket.on('error', fail).on('close', () => fail('connection closed')).on('data', (data) => {
  buffer = Buffer.concat([buffer, data])
  for (let end; (end = buffer.indexOf('\r\n')) >= 0; buffer = buffer.subarray(end + 2)) {
    const [verb, ...words] = buffer.toString('utf8', 0, end).split(' ')
    if (verb === 'MSG') { // MSG subject subscription [reply-to] bytes, and that many bytes
      const start = end + 2, size = Number(words.at(-1))
      if (buffer.length < start + size + 2) return
      handlers[words[1]](buffer.toString('utf8', start, start + size))
      end = start + size
    } else if (verb === 'INFO' && handlers.length === 0) run().catch(fail)
    else if (verb === 'PING') socket.write('PONG\r\n')
    else if (verb === '-ERR') fail(words.join(' '))
  }
})
function fail(error) { console.error(String(error)); process.exit(1) }

function subscribe(subject, handler) {
  socket.write(`SUB ${subject} ${handlers.push(handler) - 1}\r\n`)
}
function ask(subject, question) { // the answer comes in pieces; an empty one ends it
  const inbox = `_INBOX.${name}.${handlers.length}`, body = JSON.stringify(question)
  return new Promise((resolve, reject) => {
    let answer = ''
    subscribe(inbox, (piece) => {
      if (piece) return (answer += piece)
      const told = JSON.parse(answer)
      told?.status === 'error' ? reject(new Error(told.message)) : resolve(told)
    })
    socket.write(`PUB ${subject} ${inbox} ${Buffer.byteLength(body)}\r\n${body}\r\n`)
  })
}
async function run() {
  socket.write(`CONNECT ${JSON.stringify({ user: name, pass, verbose: false, lang: 'js' })}\r\n`)
  const { cluster, nodes } = await ask(`xmppd.1.about.${name}`, {})
  console.log('nodes', nodes.join(' '))
  subscribe(`xmppd.1.${cluster}.events.>`, (body) => console.log('event', body))
  for (const row of await ask(`xmppd.1.${cluster}.tables.${name}`, { table: 'sessions' })) console.log('session', row.jid, row.node)
  const args = { type: 'chat', from, to, subject: '', body: text }
  if (to) console.log('sent', await ask(`xmppd.1.${cluster}.api.${name}`, { command: 'send_message', args }))
}
