"""The process that makes HTTP requests for a node, so that their work is not done where chat is carried.

It is started by the outbox (`xmppd/outbox/process.py`), is told over a pair of sockets which requests to make, and says
what became of each. It decides nothing. Nothing is imported here: the process should start fast and stay small.
"""
