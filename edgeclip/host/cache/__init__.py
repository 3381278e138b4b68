"""Keep what the teacher says of K reproducible views of every image, and of every text.

CLIP-Embed-KD's idea with MobileCLIP's views: an epoch of distillation then costs what the student
alone costs. A view is its explicit parameters (`views`), not a seed, so that a student of another
input size can replay it anywhere. Rows are the frozen tower's; an adapted teacher's head is applied
to them on the fly.

    cache/<fingerprint>/
      img_emb/img_emb_00.npy        [m, R] float16: unit rows of view 0
      text_emb/text_emb_00.npy      [m, D] float16: unit features of the captions, where needed
      metadata/metadata_00.parquet  image_path (the image's key), caption, picture (its place)
      more_views/more_views_00.npy  [m, K - 1, R] float16: unit rows of the other views
      more_captions/...             [m, C - 1, D] float16: of an image's other captions
      records/records_00.npy        [m]: picture, norm [K] (a row is unit row x norm), view [K, P]
      class_features.npy            [N, D] float32, unit
      digests/digests_00.npy        uint8 [blocks, 16]: of the shard's other files, block by block
      manifest.json                 description, shards, sha256 of every file, and of itself

The first three are what clip-retrieval writes and embedding-reader reads, so an index can be built
of them; the others lie beside. Every shard may be shorter than it was planned, by the images that
could not be read.

Nothing is used that is not as it was written (`checked`). Rows of others, which a cache only joins
to images, stay where they lie and are not hashed.

The fingerprint is that of the description: teacher, preprocess, views, texts, data. It knows an
image by its key and size, not by its bytes: who repaints a file at equal size deletes the cache.
"""

from pathlib import Path

from edgeclip.host.cache.arrays import Rows, Shards, TeacherCache, open_folder, refuse_other_views
from edgeclip.host.cache.building import Ingredients, build
from edgeclip.host.cache.joined import lacking
from edgeclip.host.cache.texts import class_features
from edgeclip.host.cache.views import apply_view, decode_view, draw_views

CACHE = Path("cache")
"""where caches lie, relative to the working folder"""

__all__ = [
    "CACHE",
    "Ingredients",
    "Rows",
    "Shards",
    "TeacherCache",
    "apply_view",
    "build",
    "class_features",
    "decode_view",
    "draw_views",
    "lacking",
    "open_folder",
    "refuse_other_views",
]
