"""The command line, run in this process."""


def run(*arguments, **settings):
    """The command line in this process. settings: of click's context, as `terminal_width`."""
    from click.testing import CliRunner

    from edgeclip.cli import main

    return CliRunner().invoke(main, [str(a) for a in arguments], **settings)


def mistake(*arguments, says, only_line=True):
    """The one line of a user's mistake, which must say where, what and what to do."""
    result = run(*arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    lines = result.stderr.splitlines()
    errors = [line for line in lines if line.startswith("Error: ")]
    assert len(errors) == 1, result.stderr
    assert lines[-1] == errors[0], result.stderr
    assert len(lines) == 1 or not only_line, result.stderr
    assert result.stdout == "", errors[0]
    assert says in errors[0], errors[0]
    assert "; " in errors[0], errors[0]
    assert ": " in errors[0].removeprefix("Error: "), errors[0]
    return errors[0]
