"""The next version of the server: a copy of the code, to which a revision of the schema was added."""

import shutil
from pathlib import Path
from typing import Final

from xmppd.storage.migrate import revisions

ROOT: Final = Path(__file__).parents[2]
_REVISION: Final = '''"""A table that only the next version knows."""

from sqlalchemy import Column, Integer

from xmppd.storage.migrations.steps import create_table

revision = "9999"
down_revision = "{head}"
{marker}

def upgrade() -> None:
    create_table("novelty", Column("id", Integer, primary_key=True))
'''


def make_next_version(folder: Path, *, expands: bool) -> Path:
    """Its folder, for PYTHONPATH. `expands`: the revision says that code which does not know it may go on."""
    for name in ("xmppd", "modules"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "xmppd/storage/migrations/versions/r9999_novelty.py"
    file.write_text(_REVISION.format(head=revisions()[-1], marker="expands = True\n" if expands else ""))
    return folder
