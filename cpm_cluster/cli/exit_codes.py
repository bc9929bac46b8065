"""Exit codes of `cpm` and `cpm-submit`."""

OK = 0
FAILED = 1
BAD_INPUT = 2
UNAVAILABLE = 3
DOES_NOT_FIT = 4
STOPPED = 85
INTERRUPTED = 130

MEANINGS = """\
Exit codes: 0 done; 1 the run failed; 2 something to correct in the job file, the data or the command line;
3 not possible on this machine; 4 the job does not fit; 85 stopped with a checkpoint; 130 interrupted or
cancelled. A run that is followed gives its own code.
"""
EPILOG = f"\b\n{MEANINGS}"
