"""Work in a child process: even a backend that crashes ends with a message, an exit code and nothing left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable

from backend.vm.errors import CannotRun
from backend.vm.lost import VmLost

EXIT_OK = 0
EXIT_CHECK_FAILED = 1
EXIT_CANNOT_RUN = 2
EXIT_LOST = 3
EXIT_INTERRUPTED = 130

PR_SET_PDEATHSIG = 1  # prctl(2)


def guarded(work: Callable[[], int]) -> int:
    """The exit code of `work`; what it raises becomes a sentence on stderr and the exit code that goes with it."""
    try:
        return work()
    except CannotRun as error:
        _say(str(error))
        return EXIT_CANNOT_RUN
    except VmLost as error:
        _say(f"the VM was lost ({error.part}): {error}")
        return EXIT_LOST
    except KeyboardInterrupt:
        _say("interrupted; everything that this run started has ended")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has gone; stop Python from complaining about it again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CANNOT_RUN
    except Exception as error:
        traceback.print_exc()
        _say(f"the backend failed ({type(error).__name__}); the lines above say where, please report them")
        return EXIT_LOST


def supervise(work: Callable[[], int], crashed: Callable[[str], None], *, own_group: bool = True) -> int:
    """The exit code of `work`, done in a child process.

    It has a process group of its own, so that a Ctrl-C reaches it once, through us; without one (`own_group`), where it
    hands the terminal to a command, the terminal signals it directly. A child that
    dies by a signal is a lost backend, and `crashed` is told so in a sentence. Its QEMU dies with it
    (PR_SET_PDEATHSIG), as it does itself when we are killed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    asked: list[int] = []
    # blocked until the handlers stand, so that no signal falls between
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.fork()
    if child == 0:
        if own_group:
            os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        for number in signals:
            signal.signal(number, signal.default_int_handler)  # each ends the work in order, as KeyboardInterrupt
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
        code = EXIT_LOST
        try:
            code = guarded(work) if os.getppid() == parent else EXIT_INTERRUPTED
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)

    def hand_on(number: int, _frame: object) -> None:
        if not asked and (
            own_group or number != signal.SIGINT
        ):  # the work is ending already: a second signal would only cut its clearing up short
            os.kill(child, signal.SIGINT)
        asked.append(number)

    old = {number: signal.signal(number, hand_on) for number in signals}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    try:
        _, status = os.waitpid(child, 0)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return code
    sentence = f"the backend process died by {signal.Signals(-code).name}"
    _say(f"the VM was lost (backend): {sentence}")
    crashed(sentence)
    return EXIT_LOST


def _say(sentence: str) -> None:
    print(f"vioasid: {sentence}", file=sys.stderr)
