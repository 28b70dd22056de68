"""`meft-bench gpu`: one session on a machine with a GPU and no network. CUDA tests, then a fixed list of rows at the
shape of a 7B model, each beside what the simulator predicted for it; it ends by itself and goes on where it stopped.

    rows         what is measured, in order of worth
    box          what the machine has, and the one line that says what is missing
    predictions  the simulator's numbers for the rows, made before anything is measured
    cuda_tests   the tests that need a GPU, and their log
    work         the session itself, and the files it writes
    cli          the command

Nothing here needs datasets, lm-eval, pandas or a git binary.
"""
