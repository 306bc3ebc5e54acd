"""What an operator sees: the command registry, the core's commands, and the control socket that xmppctl talks to."""
