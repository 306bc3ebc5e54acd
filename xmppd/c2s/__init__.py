"""Clients: listeners, connections, negotiation, sessions."""
