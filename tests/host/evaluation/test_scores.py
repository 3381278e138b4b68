"""What `distill` and `evaluate` say of a set: is it transductive, and whose labels did stage 1
see?
"""

from edgeclip import config
from edgeclip.host import recipe
from edgeclip.host.data import EvaluationSet
from edgeclip.host.evaluation.notes import note
from edgeclip.host.evaluation.overlap import told

STUDENT = {"tower": {"kind": "timm", "model": "x", "weights": "random", "image_size": 32}}


def test_what_is_transductive_and_whose_labels_were_seen():
    def said(asked, name, part="s", **fields):
        return note(
            config.convert(
                {"teacher": {"kind": "conse"}, "student": STUDENT, "losses": {"kl": {}}, **asked},
                recipe.Recipe,
                "r",
            ),
            paint(name),
            EvaluationSet(part, [], [], "its own", **fields),
        )

    def paint(name, **fields):
        return recipe.WebDataset(name=name, root="x", **fields)

    def spec(name, **fields):
        return {"kind": "webdataset", "name": name, "root": "x", **fields}

    base_to_novel = {
        "data": spec("a", protocol="base_to_novel"),
        "adapt": {"kind": "residual_head"},
    }
    seen, unseen = "adapted on labels of its training images", "adapted on no label of it"
    assert [
        (t, seen in n) for t, n in (said(base_to_novel, "a", p) for p in ("base", "novel"))
    ] == [(True, True), (True, False)]
    assert unseen in said({"data": spec("a")}, "a")[1]
    cross = {"data": spec("a"), "adapt": {"kind": "residual_head"}, "adapt_data": spec("b")}
    assert [(t, seen in n) for t, n in (said(cross, s) for s in "abc")] == [
        (True, False),
        (None, True),  # by their names other data: not known, until the images are compared
        (None, False),
    ]
    assert "without labels" in said(base_to_novel, "a", "base")[1]
    assert (
        "with the labels that there are"
        in said({**base_to_novel, "losses": {"affinity": {}, "captions": "classes"}}, "a", "base")[
            1
        ]
    )
    assert (
        "without labels"
        in said({**cross, "losses": {"affinity": {}, "captions": "classes"}}, "a")[1]
    )
    assert said(cross, "a", shift=True) == (None, "shift; " + told(EvaluationSet("", [], [], "")))


def test_a_set_of_training_images_says_so_whatever_else_is_known():
    asked = recipe.Recipe(
        data=recipe.WebDataset(name="shop", root="shop"),
        teacher=recipe.OpenClip(model="x", weights="random"),
        student=recipe.Student(tower=recipe.Timm(model="x", weights="random", image_size=32)),
        losses=recipe.Losses(kl=recipe.KL()),
    )
    s = EvaluationSet(
        "val", [], [0], "TRAINING IMAGES are among these: test images", role="trained with names"
    )
    known = note(asked, asked.data, s)
    assert known.transductive and known.text == s.note
    assert "TRAINING" not in note(asked, asked.data, s._replace(role="unseen")).text
