"""The one exception that is meant for the person at the keyboard."""


class UserError(Exception):
    """Bad usage or bad input, said in one sentence that names the file, the field and the mend.

    The command lines print it without a traceback and exit with code 2.
    """
