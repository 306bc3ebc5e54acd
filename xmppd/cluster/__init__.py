"""xmppd."""
