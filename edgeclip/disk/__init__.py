"""Everything edgeclip leaves on disk goes through here, so that a half-written thing is never taken
for a whole one.

A file is written under a temporary name, synced and renamed. A folder is built beside its final
place, its `manifest.json` is written last and carries the sha256 of every other file, and one
rename, or one exchange of names, makes it visible. Whoever finds a manifest may trust the folder;
whoever distrusts it can check the hashes.
"""

from edgeclip.disk.arrays import Declared, read_declared, read_declared_arrays
from edgeclip.disk.exchange import reading, unread
from edgeclip.disk.leftovers import MANIFEST, sweep
from edgeclip.disk.locks import locked, shared
from edgeclip.disk.places import (
    cache_folder,
    finished_in,
    given,
    is_utf8,
    refuse_foreign,
    refuse_not_utf8,
    refuse_unwritable,
    shown,
)
from edgeclip.disk.reading import (
    Description,
    Json,
    differences,
    edges,
    fingerprint,
    read_array,
    read_arrays,
    read_entries,
    read_json,
    read_manifest,
    sha256,
    verify,
    verify_files,
)
from edgeclip.disk.records import (
    FORMAT,
    VERDICTS,
    Record,
    from_json,
    read_record,
    to_json,
    write_record,
)
from edgeclip.disk.writing import (
    new_file,
    new_folder,
    write_array,
    write_json,
    write_manifest,
    write_sealed,
    write_text,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERDICTS",
    "Declared",
    "Description",
    "Json",
    "Record",
    "cache_folder",
    "differences",
    "edges",
    "fingerprint",
    "finished_in",
    "from_json",
    "given",
    "is_utf8",
    "locked",
    "new_file",
    "new_folder",
    "read_array",
    "read_arrays",
    "read_declared",
    "read_declared_arrays",
    "read_entries",
    "read_json",
    "read_manifest",
    "read_record",
    "reading",
    "refuse_foreign",
    "refuse_not_utf8",
    "refuse_unwritable",
    "sha256",
    "shared",
    "shown",
    "sweep",
    "to_json",
    "unread",
    "verify",
    "verify_files",
    "write_array",
    "write_json",
    "write_manifest",
    "write_record",
    "write_sealed",
    "write_text",
]
