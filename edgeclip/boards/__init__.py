"""A board, reached from the host: look at it, send what is missing, run there, bring the report back.

    link.py      how a request gets there: asyncssh with the user's own ssh setup, or a command prefix
    agent.py     what answers it: standard library only, sent anew with every request, so nothing is installed first
    runner.py    the device layer and its wheels for the board's platform and Python, fetched on the host
    board.py     the verbs: preflight, validate, bench, clean
    own_sshd.py  an sshd of edgeclip's own on 127.0.0.1, and the emulated aarch64 board behind it

The command that a board is asked to run is one constant string; everything else travels as JSON on its standard input.
The host judges: a board returns features and answers, and what it could have got wrong is compared here.
"""
