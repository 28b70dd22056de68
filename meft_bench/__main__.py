"""python -m meft_bench is meft-bench."""

import signal
import sys


def main() -> int:
    """cli.main, with ctrl-C answered while the command line is read in and while the process ends."""
    try:
        from meft_bench import cli

        code = cli.main()
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing is left to be said
        return code
    except KeyboardInterrupt:
        print("\nmeft-bench: stopped", file=sys.stderr)
        return 130
    finally:
        # Where ctrl-C landed in code that a library makes from a string (a dataclass), Python would end this process by
        # the signal although it was answered. The next such call makes it forget that.
        exec("")


if __name__ == "__main__":
    sys.exit(main())
