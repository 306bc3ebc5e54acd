"""The bundled modules. Each file or folder here is one, by the name used under `modules:` in xmppd.yml."""

# The loader refuses a foreign package that happens to be called `modules`.
XMPPD_MODULES_API = 1
