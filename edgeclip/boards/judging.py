"""What the host makes of a device's answers: parity, and which step lost what."""

from pathlib import Path

import msgspec

from edgeclip.boards.waterfall import Steps
from edgeclip.device import profile as D
from edgeclip.device.bundle import Bundle
from edgeclip.device.evaluation import Evaluation, looked_at
from edgeclip.device.machine import Facts
from edgeclip.device.profile import Device
from edgeclip.device.validate import Judged, Observed, judged


class Judge:
    """The judge of a run's bundles on one device; runs the run's float graphs once for all."""

    def __init__(self, run: Path | None, device: Device, evaluation: Evaluation | None) -> None:
        self.evaluation = evaluation
        if evaluation is not None:
            self.evaluation = looked_at(evaluation)
        self.here = not D.is_remote(device)
        self.steps: Steps | None = None
        if run is not None and evaluation is not None and evaluation.student is not None:
            self.steps = Steps(run, evaluation, evaluation.student)

    def judged(self, bundle: Bundle, observed: Observed, machine: Facts) -> Judged:
        """Return the parity report of what a device observed of a bundle, and the answers."""
        found = judged(bundle, self.evaluation, observed, machine)
        if self.steps is None or found.report.cosine is None:
            return found
        steps = self.steps.of(bundle, observed, self.here)
        return found._replace(report=msgspec.structs.replace(found.report, waterfall=steps))
