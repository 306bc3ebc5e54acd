"""xmppctl: sends its arguments to the node's control socket and prints the answer."""
