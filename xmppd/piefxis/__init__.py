"""Accounts and what they have in files that other servers read and write (XEP-0227, "PIEFXIS")."""

from xmppd.piefxis.exporting import Exporter
from xmppd.piefxis.importing import Importer, Report

__all__ = ["Exporter", "Importer", "Report"]
