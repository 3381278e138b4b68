"""Checkpoints are written where the recipe says so."""

import pytest

from edgeclip.host.distill import resume
from tests.support.command import run
from tests.support.files import write
from tests.support.images import toy_image
from tests.support.tiny_recipe import RECIPE


@pytest.mark.parametrize("every", [0, 2])
def test_a_checkpoint_is_due_every_so_many_steps_and_0_is_at_the_epochs_end_alone(
    here, monkeypatch, every
):
    for label in ("apple", "pear"):
        (here / "photos" / label).mkdir(parents=True)
        for i in range(15):
            toy_image(i + 1000 * (label == "pear")).save(here / "photos" / label / f"{i}.png")
    found = []
    save = resume.Keeper._save

    def noted(self, *arguments):
        found.append(self.progress.at.done)
        save(self, *arguments)

    monkeypatch.setattr(resume.Keeper, "_save", noted)
    train = f"train: {{checkpoint_every: {every}, "
    write(here, RECIPE.replace("ROOT", "photos").replace("train: {", train))
    result = run("distill", "r.yaml")
    assert result.exit_code == 0, result.output
    last = found.pop()
    assert found == ([] if every == 0 else list(range(2, last, 2)))
