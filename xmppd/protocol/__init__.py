"""Pure XMPP: addresses, stanzas, streams. Nothing here awaits and nothing opens a socket."""
