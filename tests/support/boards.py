"""A verb of a board, asked without a command."""

from edgeclip.boards.board import Board
from edgeclip.device.bundle import Bundle
from edgeclip.device.records import ParityReport
from edgeclip.device.validate import judge


def validated(board: Board, bundle: Bundle) -> ParityReport:
    """Return the parity report of a bundle without a run."""
    return judge(bundle, None, board.observe(bundle, None), board.facts)
