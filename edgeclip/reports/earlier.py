"""Say how a report differs from the one before on the same images, for page and terminal."""

from edgeclip.device.per_class import shown
from edgeclip.device.records import Earlier


def sentence(found: Earlier) -> str:
    """Return the paired difference to an earlier report, or why there is none."""
    of = f"the report of {shown(found.when[:10])} (bundle {found.bundle[:8]})"
    if found.why is not None or found.drop_pp is None or found.p is None:
        return f"against {of}: not comparable: {found.why or 'no figures were kept'}"
    text = (
        f"against {of}: {found.won} won and {found.lost} lost of {found.images:,} images that both"
        f" judged; top-1 {found.top1_then:.4f} then and {found.top1_now:.4f} now, lost"
        f" {found.drop_pp:.2f} pp (95 % limits {found.lower_pp:.2f} to {found.upper_pp:.2f}),"
        f" exact McNemar p {found.p:.4f}"
    )
    return text + _rest(found)


def _rest(found: Earlier) -> str:
    """Return which images took no part."""
    then, now = found.judged_then, found.judged_now
    text = ""
    if then is not None and now is not None and not then == now == found.images:
        text = f"; that one judged {then:,}, this one {now:,}"
    if found.relabeled:
        text += f"; {found.relabeled:,} left out since their label was changed"
    return text
