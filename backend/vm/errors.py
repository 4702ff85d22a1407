"""The one error that stops a command before, or instead of, a guest: something of the host is missing or refused."""


class CannotRun(Exception):
    """The command cannot run here. The message is one or more sentences: what is wrong, where, and what to do about it.

    The CLI prints the message alone, without a traceback, and exits with 2.
    """
