"""The cases the recorder runs, command by command; each file starts with its own accounts and sessions."""

from dataclasses import dataclass, field
from typing import Any

JULIET = {
    "user": "juliet",
    "resource": "balcony",
    "presence": "<presence><show>away</show><status>O Romeo</status><priority>5</priority></presence>",
}
JULIET_PHONE = {"user": "juliet", "resource": "phone", "presence": "<presence><priority>-1</priority></presence>"}
ROMEO = {"user": "romeo", "resource": "orchard", "presence": "<presence/>"}
SILENT = {"user": "nurse", "resource": "silent", "presence": ""}
PAIR = {"juliet": "rose", "romeo": "sweet"}
TRIO = {**PAIR, "nurse": "angelica"}


@dataclass
class Case:
    name: str
    argv: tuple[str, ...]
    stdin: str | None = None
    watch: bool = False  # record what the clients received
    note: str = ""


@dataclass
class CommandFile:
    command: str
    cases: list[Case]
    accounts: dict[str, str] = field(default_factory=dict)
    online: list[dict[str, Any]] = field(default_factory=list)
    before: list[list[str]] = field(default_factory=list)
    after: list[list[str]] = field(default_factory=list)
    scrub: list[tuple[str, str]] = field(default_factory=list)
    stops_node: bool = False


def case(name: str, *argv: str, **options: Any) -> Case:
    return Case(name, argv, **options)


INFO_ROW = [(r"^(\S+\tc2s_tls\t127\.0\.0\.1\t)\d+\t(\S+)\t(\S+)\t\d+\t", r"\1{port}\t\2\t\3\t{uptime}\t")]
SESSION_ROW = [(r"^(c2s_tls\t127\.0\.0\.1\t)\d+\t(\S+)\t(\S+)\t\d+\t", r"\1{port}\t\2\t\3\t{uptime}\t")]

CASES = [
    CommandFile(
        "register",
        [
            case("a new account", "register", "benvolio", "localhost", "pw"),
            case("the same account again", "register", "benvolio", "localhost", "other"),
            case("the same account in capitals", "register", "Benvolio", "localhost", "pw"),
            case("an account on the other host", "register", "tybalt", "capulet.example", "pw"),
            case("an unknown host", "register", "benvolio", "verona.example", "pw"),
            case("a user that is no local part", "register", "ben@volio", "localhost", "pw"),
            case("a user with a blank", "register", "ben volio", "localhost", "pw"),
            case("an empty user", "register", "", "localhost", "pw"),
            case("an empty password", "register", "mercutio", "localhost", ""),
            case("a password with blanks and accents", "register", "paris", "localhost", "pässwörd with blanks"),
            case("too few arguments", "register", "benvolio"),
            case("too many arguments", "register", "benvolio", "localhost", "pw", "more"),
        ],
        after=[["unregister", "tybalt", "capulet.example"], ["unregister", "", "localhost"]],
    ),
    CommandFile(
        "unregister",
        [
            case("an account", "unregister", "juliet", "localhost"),
            case("an account that is gone", "unregister", "juliet", "localhost"),
            case("an account that is online", "unregister", "romeo", "localhost", watch=True),
            case("an unknown host", "unregister", "juliet", "verona.example"),
            case("a user that is no local part", "unregister", "ju@liet", "localhost"),
            case("too few arguments", "unregister", "juliet"),
        ],
        accounts=PAIR,
        online=[ROMEO],
    ),
    CommandFile(
        "change_password",
        [
            case("an account", "change_password", "juliet", "localhost", "new"),
            case("the new password holds", "check_password", "juliet", "localhost", "new"),
            case("the old one does not", "check_password", "juliet", "localhost", "rose"),
            case("no such user", "change_password", "nobody", "localhost", "new"),
            case("an unknown host", "change_password", "juliet", "verona.example", "new"),
            case("an empty password", "change_password", "juliet", "localhost", ""),
            case("an account that is online", "change_password", "romeo", "localhost", "new", watch=True),
            case("too few arguments", "change_password", "juliet", "localhost"),
        ],
        accounts=PAIR,
        online=[ROMEO],
    ),
    CommandFile(
        "check_password",
        [
            case("right", "check_password", "juliet", "localhost", "rose"),
            case("wrong", "check_password", "juliet", "localhost", "thorn"),
            case("no such user", "check_password", "nobody", "localhost", "rose"),
            case("an unknown host", "check_password", "juliet", "verona.example", "rose"),
            case("too few arguments", "check_password", "juliet", "localhost"),
        ],
        accounts=PAIR,
    ),
    CommandFile(
        "check_account",
        [
            case("an account", "check_account", "juliet", "localhost"),
            case("no such user", "check_account", "nobody", "localhost"),
            case("an unknown host", "check_account", "juliet", "verona.example"),
            case("a user that is no local part", "check_account", "ju@liet", "localhost"),
            case("too many arguments", "check_account", "juliet", "localhost", "x"),
        ],
        accounts=PAIR,
    ),
    CommandFile(
        "registered_users",
        [
            case("two accounts", "registered_users", "localhost"),
            case("a host without accounts", "registered_users", "capulet.example"),
            case("an unknown host", "registered_users", "verona.example"),
            case("no argument", "registered_users"),
        ],
        accounts=PAIR,
    ),
    CommandFile(
        "registered_vhosts",
        [case("the hosts", "registered_vhosts"), case("too many arguments", "registered_vhosts", "x")],
    ),
    CommandFile(
        "connected_users",
        [case("three sessions", "connected_users"), case("too many arguments", "connected_users", "localhost")],
        accounts=TRIO,
        online=[JULIET, JULIET_PHONE, ROMEO],
    ),
    CommandFile("connected_users_none", [case("nobody is online", "connected_users")], accounts=PAIR),
    CommandFile(
        "connected_users_info",
        [
            case("four sessions", "connected_users_info"),
            case("too many arguments", "connected_users_info", "localhost"),
        ],
        accounts=TRIO,
        online=[JULIET, JULIET_PHONE, ROMEO, SILENT],
        scrub=INFO_ROW,
    ),
    CommandFile("connected_users_info_none", [case("nobody is online", "connected_users_info")]),
    CommandFile(
        "connected_users_number",
        [case("three sessions", "connected_users_number"), case("too many arguments", "connected_users_number", "x")],
        accounts=TRIO,
        online=[JULIET, JULIET_PHONE, ROMEO],
    ),
    CommandFile("connected_users_number_none", [case("nobody is online", "connected_users_number")]),
    CommandFile(
        "user_resources",
        [
            case("two resources", "user_resources", "juliet", "localhost"),
            case("offline", "user_resources", "nurse", "localhost"),
            case("no such user", "user_resources", "nobody", "localhost"),
            case("an unknown host", "user_resources", "juliet", "verona.example"),
            case("a user that is no local part", "user_resources", "ju@liet", "localhost"),
            case("too few arguments", "user_resources", "juliet"),
        ],
        accounts=TRIO,
        online=[JULIET, JULIET_PHONE],
    ),
    CommandFile(
        "user_sessions_info",
        [
            case("two sessions", "user_sessions_info", "juliet", "localhost"),
            case("a session without presence", "user_sessions_info", "nurse", "localhost"),
            case("offline", "user_sessions_info", "romeo", "localhost"),
            case("no such user", "user_sessions_info", "nobody", "localhost"),
            case("an unknown host", "user_sessions_info", "juliet", "verona.example"),
            case("too few arguments", "user_sessions_info", "juliet"),
        ],
        accounts=TRIO,
        online=[JULIET, JULIET_PHONE, SILENT],
        scrub=SESSION_ROW,
    ),
    CommandFile(
        "kick_user",
        [
            case("offline", "kick_user", "romeo", "localhost"),
            case("two sessions", "kick_user", "juliet", "localhost", watch=True),
            case("no such user", "kick_user", "nobody", "localhost"),
            case("an unknown host", "kick_user", "juliet", "verona.example"),
            case("too few arguments", "kick_user", "juliet"),
        ],
        accounts=PAIR,
        online=[JULIET, JULIET_PHONE],
    ),
    CommandFile(
        "kick_session",
        [
            case("one of two sessions", "kick_session", "juliet", "localhost", "phone", "Go to bed", watch=True),
            case("a resource that is not there", "kick_session", "juliet", "localhost", "phone", "Go to bed"),
            case("no such user", "kick_session", "nobody", "localhost", "phone", "Go to bed"),
            case("an unknown host", "kick_session", "juliet", "verona.example", "phone", "Go to bed"),
            case("the reason is missing", "kick_session", "juliet", "localhost", "phone"),
        ],
        accounts=PAIR,
        online=[JULIET, JULIET_PHONE],
    ),
    CommandFile(
        "send_message",
        [
            case(
                "a headline to a full JID",
                "send_message",
                "headline",
                "localhost",
                "juliet@localhost/balcony",
                "Restart",
                "In 5 minutes",
                watch=True,
            ),
            case(
                "a chat message to a bare JID",
                "send_message",
                "chat",
                "romeo@localhost",
                "juliet@localhost",
                "",
                "Hello",
                watch=True,
            ),
            case(
                "type normal",
                "send_message",
                "normal",
                "romeo@localhost",
                "juliet@localhost",
                "Subject",
                "Body & <tag>",
                watch=True,
            ),
            case("no body", "send_message", "chat", "romeo@localhost", "juliet@localhost", "Subject", "", watch=True),
            case(
                "to a user who does not exist",
                "send_message",
                "chat",
                "romeo@localhost",
                "nobody@localhost",
                "",
                "Hello",
            ),
            case("from an address that is none", "send_message", "chat", "@localhost", "juliet@localhost", "", "Hello"),
            case("to an address that is none", "send_message", "chat", "romeo@localhost", "juliet@", "", "Hello"),
            case(
                "an unknown type",
                "send_message",
                "shout",
                "romeo@localhost",
                "juliet@localhost",
                "",
                "Hello",
                watch=True,
            ),
            case("too few arguments", "send_message", "chat", "romeo@localhost", "juliet@localhost", "Hello"),
        ],
        accounts=PAIR,
        online=[JULIET],
    ),
    CommandFile(
        "send_stanza",
        [
            case(
                "a message",
                "send_stanza",
                "romeo@localhost",
                "juliet@localhost/balcony",
                "<message id='m1' type='chat'><body>Hi</body></message>",
                watch=True,
            ),
            case(
                "own addresses in the stanza",
                "send_stanza",
                "romeo@localhost",
                "juliet@localhost",
                "<message from='x@y' to='z@w' id='m2'><body>Hi</body></message>",
                watch=True,
            ),
            case(
                "a presence",
                "send_stanza",
                "romeo@localhost/orchard",
                "juliet@localhost",
                "<presence><show>dnd</show></presence>",
                watch=True,
            ),
            case(
                "XML that is not well-formed",
                "send_stanza",
                "romeo@localhost",
                "juliet@localhost",
                "<message><body>Hi</message>",
            ),
            case("no XML at all", "send_stanza", "romeo@localhost", "juliet@localhost", "Hi"),
            case(
                "an element that is no stanza",
                "send_stanza",
                "romeo@localhost",
                "juliet@localhost",
                "<note/>",
                watch=True,
            ),
            case("from an address that is none", "send_stanza", "@localhost", "juliet@localhost", "<message/>"),
            case("to an address that is none", "send_stanza", "romeo@localhost", "juliet@", "<message/>"),
            case("too few arguments", "send_stanza", "romeo@localhost", "juliet@localhost"),
        ],
        accounts=PAIR,
        online=[JULIET],
    ),
    CommandFile(
        "add_rosteritem",
        [
            case(
                "one group",
                "add_rosteritem",
                "juliet",
                "localhost",
                "romeo",
                "localhost",
                "Romeo",
                "Lovers",
                "both",
                watch=True,
            ),
            case(
                "the same item, changed",
                "add_rosteritem",
                "juliet",
                "localhost",
                "romeo",
                "localhost",
                "R.",
                "Lovers;Montagues",
                "to",
            ),
            case(
                "several groups",
                "add_rosteritem",
                "juliet",
                "localhost",
                "nurse",
                "localhost",
                "Nurse",
                "Family;Household",
                "from",
                watch=True,
            ),
            case(
                "no group", "add_rosteritem", "juliet", "localhost", "tybalt", "capulet.example", "Tybalt", "", "none"
            ),
            case("no name", "add_rosteritem", "juliet", "localhost", "paris", "localhost", "", "", "both"),
            case("what the roster is now", "get_roster", "juliet", "localhost"),
            case(
                "an unknown subscription",
                "add_rosteritem",
                "juliet",
                "localhost",
                "paris",
                "localhost",
                "Paris",
                "",
                "love",
            ),
            case("no such user", "add_rosteritem", "nobody", "localhost", "romeo", "localhost", "Romeo", "", "both"),
            case(
                "an unknown host",
                "add_rosteritem",
                "juliet",
                "verona.example",
                "romeo",
                "localhost",
                "Romeo",
                "",
                "both",
            ),
            case(
                "a user that is no local part",
                "add_rosteritem",
                "ju@liet",
                "localhost",
                "romeo",
                "localhost",
                "Romeo",
                "",
                "both",
            ),
            case(
                "a contact that is no local part",
                "add_rosteritem",
                "juliet",
                "localhost",
                "ro@meo",
                "localhost",
                "Romeo",
                "",
                "both",
            ),
            case("too few arguments", "add_rosteritem", "juliet", "localhost", "romeo", "localhost", "Romeo", "Lovers"),
        ],
        accounts=TRIO,
        online=[{**JULIET, "interested": True}],
    ),
    CommandFile(
        "delete_rosteritem",
        [
            case("an item", "delete_rosteritem", "juliet", "localhost", "romeo", "localhost", watch=True),
            case("what the roster is now", "get_roster", "juliet", "localhost"),
            case("an item that is not there", "delete_rosteritem", "juliet", "localhost", "romeo", "localhost"),
            case("no such user", "delete_rosteritem", "nobody", "localhost", "romeo", "localhost"),
            case("an unknown host", "delete_rosteritem", "juliet", "verona.example", "romeo", "localhost"),
            case("a user that is no local part", "delete_rosteritem", "ju@liet", "localhost", "romeo", "localhost"),
            case("too few arguments", "delete_rosteritem", "juliet", "localhost", "romeo"),
        ],
        accounts=PAIR,
        before=[["add_rosteritem", "juliet", "localhost", "romeo", "localhost", "Romeo", "Lovers", "both"]],
        online=[{**JULIET, "interested": True}],
    ),
    CommandFile(
        "get_roster",
        [
            case("three contacts", "get_roster", "juliet", "localhost"),
            case("an empty roster", "get_roster", "romeo", "localhost"),
            case("no such user", "get_roster", "nobody", "localhost"),
            case("an unknown host", "get_roster", "juliet", "verona.example"),
            case("a user that is no local part", "get_roster", "ju@liet", "localhost"),
            case("too few arguments", "get_roster", "juliet"),
        ],
        accounts=TRIO,
        before=[
            ["add_rosteritem", "juliet", "localhost", "romeo", "localhost", "Romeo", "Lovers;Montagues", "both"],
            ["add_rosteritem", "juliet", "localhost", "nurse", "localhost", "Good Nurse", "Family", "from"],
            ["add_rosteritem", "juliet", "localhost", "tybalt", "capulet.example", "", "", "none"],
        ],
    ),
    CommandFile(
        "get_offline_count",
        [
            case("two messages", "get_offline_count", "juliet", "localhost"),
            case("none", "get_offline_count", "romeo", "localhost"),
            case("no such user", "get_offline_count", "nobody", "localhost"),
            case("an unknown host", "get_offline_count", "juliet", "verona.example"),
            case("too few arguments", "get_offline_count", "juliet"),
        ],
        accounts=PAIR,
        before=[
            ["send_message", "chat", "romeo@localhost", "juliet@localhost", "", "One"],
            ["send_message", "chat", "romeo@localhost", "juliet@localhost", "", "Two"],
        ],
    ),
    CommandFile(
        "stats",
        [
            case("registeredusers", "stats", "registeredusers"),
            case("onlineusers", "stats", "onlineusers"),
            case("onlineusersnode", "stats", "onlineusersnode"),
            case("uptimeseconds", "stats", "uptimeseconds"),
            case("processes", "stats", "processes"),
            case("a name that does not exist", "stats", "moonphase"),
            case("no argument", "stats"),
        ],
        accounts=TRIO,
        online=[JULIET, JULIET_PHONE],
        scrub=[(r"^\d{2,}$", "{number}")],
    ),
    CommandFile(
        "stats_host",
        [
            case("registeredusers", "stats_host", "registeredusers", "localhost"),
            case("onlineusers", "stats_host", "onlineusers", "localhost"),
            case("a host without accounts", "stats_host", "registeredusers", "capulet.example"),
            case("a name that does not exist", "stats_host", "moonphase", "localhost"),
            case("a name that is not per host", "stats_host", "uptimeseconds", "localhost"),
            case("an unknown host", "stats_host", "registeredusers", "verona.example"),
            case("too few arguments", "stats_host", "registeredusers"),
        ],
        accounts=TRIO,
        online=[JULIET, JULIET_PHONE],
    ),
    CommandFile(
        "get_loglevel",
        [case("the level", "get_loglevel"), case("too many arguments", "get_loglevel", "x")],
    ),
    CommandFile(
        "set_loglevel",
        [
            case("by name", "set_loglevel", "debug"),
            case("what it is now", "get_loglevel"),
            case("by number", "set_loglevel", "4"),
            case("what the number meant", "get_loglevel"),
            case("none", "set_loglevel", "none"),
            case("what none is called", "get_loglevel"),
            case("warning", "set_loglevel", "warning"),
            case("what warning is called", "get_loglevel"),
            case("a level that does not exist", "set_loglevel", "loud"),
            case("a number that is no level", "set_loglevel", "9"),
            case("no argument", "set_loglevel"),
        ],
        after=[["set_loglevel", "info"]],
    ),
    CommandFile(
        "reload_config",
        [case("nothing changed", "reload_config"), case("too many arguments", "reload_config", "x")],
    ),
    CommandFile(
        "help",
        [
            case("one command", "help", "register"),
            case("a command with a list result", "help", "connected_users_info"),
            case("a name that does not exist", "help", "elope"),
            case("a pattern", "help", "regist*"),
            case("an unknown command", "elope"),
            case("an unknown command with arguments", "elope", "juliet", "localhost"),
        ],
    ),
    CommandFile(
        "status",
        [
            case("running", "status"),
            case("too many arguments", "status", "x"),
            case("started: running", "started"),
            case("start while running", "start"),
            case("stop", "stop"),
            case("stopped: waits until it is", "stopped"),
            case("not running", "status"),
            case("another command while not running", "registered_users", "localhost"),
            case("stop while not running", "stop"),
            case("start", "start"),
            case("started: waits until it is", "started"),
            case("running again", "status"),
            case("restart", "restart"),
            case("started after restart", "started"),
            case("running after restart", "status"),
        ],
        stops_node=True,
    ),
]
