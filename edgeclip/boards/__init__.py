"""A board, reached from the host: look at it, send what is missing, run there, bring back a report.

    measure.py    the verbs validate, bench, selftest and preflight, here and on a board
    selection.py  which bundles it measures
    board.py      one board: what is missing is copied, what is asked is run
    preflight.py  is it fit to be measured?
    doctor.py     what this machine can do
    link.py       how a request gets there: the user's own ssh setup, or a command prefix
    agent.py      what answers it: standard library only, sent with every request
    runner.py     the device layer and its wheels for the board's platform and Python
    loopback.py   an sshd of edgeclip's own on 127.0.0.1, and the emulated aarch64 board behind it

The command that a board is asked to run is one constant string; everything else travels as JSON on
its standard input. The host judges: a board returns features and answers, and what it could have
got wrong is compared here.
"""
