"""The images that give ranges and those that judge them are other images, all named, and none is
held out.
"""

import pytest

from edgeclip.device.images import ImageRef
from edgeclip.device.target import Calibration
from edgeclip.errors import EdgeclipError
from tests.support.images import toy_image


def drawn(source, pool, held_out=(), **fields):
    from edgeclip.host.export.calibration import draw

    return draw(
        source._replace(calibration=lambda: pool, evaluation_hashes=lambda: set(held_out)),
        Calibration(**fields),
    )


def test_images_of_ranges_and_images_to_judge_on_never_overlap_and_are_all_named(source):
    pool = source.calibration()
    found = drawn(source, pool, images=20, judged_on=12)
    assert (len(found.ranges), len(found.judged)) == (20, 12) and len(
        {u.key for u in found.used}
    ) == 32
    assert [u.use for u in found.used] == ["ranges"] * 20 + ["judged"] * 12
    again, other = (
        drawn(source, pool, images=20, judged_on=12),
        drawn(source, pool, images=20, judged_on=12, seed=1),
    )
    assert again.used == found.used != other.used
    assert drawn(source, pool, images=20, judged_on=0).judged.shape[0] == 20


def test_evaluation_images_among_the_calibration_images_are_refused_by_name(source):
    pool = source.calibration()[:32]
    leaked = drawn(source, pool, images=24, judged_on=8).used[7]
    with pytest.raises(EdgeclipError, match=f"1 of its images are evaluation images.*{leaked.key}"):
        drawn(source, pool, held_out=[leaked.sha256], images=24, judged_on=8)


def test_images_that_are_all_alike_are_refused(source, tmp_path):
    pool = [ImageRef(f"{i}.png", str(tmp_path / f"{i}.png")) for i in range(16)]
    for i, p in enumerate(pool):
        toy_image(3).point(lambda v, i=i: min(255, v + i % 2)).save(
            p.path
        )  # not the same bytes, yet the same image
    with pytest.raises(EdgeclipError, match="8 images are all alike"):
        drawn(source, pool, images=8, judged_on=8)
