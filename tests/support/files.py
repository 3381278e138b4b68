"""The repository, and what lies in a folder."""

from pathlib import Path

REPO = Path(__file__).parents[2]


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones included: equal before and after where nothing may be
    left behind.
    """
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b""
        for p in sorted(folder.rglob("*"))
    }


def same(folder, before):
    assert snapshot(folder) == before, sorted(snapshot(folder).keys() ^ before.keys())


def write(folder, text, name="r.yaml"):
    (folder / name).write_text(text)
    return folder / name
