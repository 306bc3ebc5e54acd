"""The delivery vectors (tests/vectors): what each profile expects, as tests ask for it."""

from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "vectors"
PROFILES = ("compat", "rfc6121")


def expected(vector: dict[str, Any], profile: str) -> Any:
    """What a profile does: compat takes `ours` where it stands; rfc6121 `strict`, else `ours`."""
    order = ("ours", "compat") if profile == "compat" else ("strict", "ours", "compat")
    return next(vector[key] for key in order if key in vector)


def load(name: str) -> list[dict[str, Any]]:
    """The vectors of one file that are due."""
    with (FOLDER / f"{name}.yaml").open() as file:
        [vectors] = yaml.safe_load(file).values()
    return [vector for vector in vectors if "due" not in vector]


def each(*names: str) -> pytest.MarkDecorator:
    """Parametrise a test with `vector` and `profile`."""
    return pytest.mark.parametrize(
        ("vector", "profile"),
        [
            pytest.param(vector, profile, id=f"{vector['id']}-{profile}")
            for name in names
            for vector in load(name)
            for profile in PROFILES
        ],
    )
