"""Errors a user can cause or mend; the command line prints them as one line and leaves with their code."""


class UserError(Exception):
    """Something the user can put right; the message names the file or key and says how."""

    exit_code = 2


class DoesNotFit(UserError):
    """The work needs more memory than there is."""

    exit_code = 3


class DiskRefuses(UserError):
    """A disk is full, or may not be written to."""


class Interrupted(Exception):
    """Ctrl-C was pressed; the message says what was saved and how to go on."""

    exit_code = 130


LESS_MEMORY = "finished work is kept; `lowvram-db plan CONFIG --explain` tells what a new run needs in each way"
