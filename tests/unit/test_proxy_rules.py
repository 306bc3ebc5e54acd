"""The rules themselves: tests/storage and tests/modules hold every statement against them."""

import pytest

from tests.storage.proxy_rules import problem


@pytest.mark.parametrize(
    "sql",
    [
        "SAVEPOINT one",
        "CALL tidy()",
        "SELECT GET_LOCK('x', 1)",
        "SELECT id FROM spool FOR UPDATE SKIP LOCKED",
        "SET @n = 1",
        "SELECT @n := 1",
        "SELECT LAST_INSERT_ID()",
        "PREPARE one FROM 'SELECT 1'",
        "XA START 'x'",
        "LOCK TABLES spool WRITE",
        "CREATE TEMPORARY TABLE x (n INT)",
        "DELETE FROM spool; DELETE FROM node",
        "CREATE VIEW x AS SELECT 1",
        "SELECT username FROM account WHERE username = %s",
        "HANDLER spool OPEN",
    ],
)
def test_what_a_proxy_would_not_understand_is_refused(sql: str) -> None:
    assert problem(sql) is not None


@pytest.mark.parametrize(
    "sql",
    [
        "/*master*/ SELECT username FROM account WHERE account.server_host = %s",
        "INSERT INTO setting (name, value) VALUES (%s, %s) ON DUPLICATE KEY UPDATE name = setting.name",
        "START TRANSACTION",
        "SELECT stanza FROM spool WHERE sender = '@x'",
        "UPDATE spool SET take_id = %s WHERE id IN (%s, %s) ORDER BY id LIMIT %s",
    ],
)
def test_plain_statements_are_not(sql: str) -> None:
    assert problem(sql) is None
