"""Clusters in memory, over SQLite, and over MariaDB for what stores."""

from tests.modules.conftest import mariadb_for_modules, sqlite_file

__all__ = ["mariadb_for_modules", "sqlite_file"]
