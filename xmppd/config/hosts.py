"""Names of the domains we serve, in the form addresses are compared in (RFC 7622 3.2)."""

from encodings.idna import ToASCII, nameprep
from ipaddress import AddressValueError, IPv4Address, IPv6Address


def normalise_host(value: object) -> str:
    """`example.net` for `Example.NET.`; ValueError says what is wrong with it.

    The result is the one our JID type gives for the same domain; `tests/unit/test_config_types.py` holds it to that.
    """
    if not isinstance(value, str):
        raise ValueError("expected a domain such as example.net")
    name = value.strip().removesuffix(".")
    if name.startswith("[") and name.endswith("]"):
        try:
            IPv6Address(name[1:-1])
        except AddressValueError:
            raise ValueError("expected a domain such as example.net") from None
        return name.lower()
    try:
        IPv4Address(name)
    except AddressValueError:
        labels = [_label(label) for label in name.split(".")]
    else:
        return name
    host = ".".join(labels)
    if len(host.encode()) > 1023:
        raise ValueError("expected a domain of at most 1023 bytes")
    return host


def _label(label: str) -> str:
    if not label:
        raise ValueError("expected a domain such as example.net, without empty labels")
    try:
        prepared: str = nameprep(label)
        ToASCII(prepared)
    except UnicodeError:
        raise ValueError("expected a domain whose labels are letters, digits and hyphens, 1 to 63 each") from None
    allowed = all(char.isalnum() or char in "-_" or not char.isascii() for char in prepared)
    if not prepared or not allowed or prepared.startswith("-") or prepared.endswith("-"):
        raise ValueError("expected a domain whose labels are letters, digits and hyphens, 1 to 63 each")
    return prepared
