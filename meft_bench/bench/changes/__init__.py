"""Every change of the engine against what it replaces, in pairs in one run.

Each file here but frame.py and sizes.py is found by itself; it names what it compares and offers one function:

    def changes(sizes: Sizes) -> Iterator[Change]

A Change holds two callables without arguments, `old` (what was done before: plain torch, two calls, a pass more) and
`new` (what the engine does now), on inputs of the same size. `old` is kept here, where it is timed, and nowhere else;
where it is a fallback of the engine it is called there. `sizes` says what the times depend on, `counts` what each does
by count (bytes, calls, passes); the golden file keeps these whole numbers. `before` makes fresh inputs for a round and
`ready` takes back what the call before did, both untimed: a step that is made leaves the next call nothing to do.

A generator frees a pair's memory before the next one is made. The frame runs `old` and `new` in turn, the other first
in every second round, takes the ratio within a round, and reports the median ratio over n rounds with its interval:

    def changes(sizes: Sizes) -> Iterator[Change]:
        layer = Layer(sizes)
        yield Change(name="rows in one call", old=layer.twice, new=layer.once, sizes={"rows": 1600, "D": 4096},
                     counts={"calls": (2, 1)}, before=layer.draw)

Who adds or changes a pair makes its golden part again (python -m tests.harness.golden changes), and raises NUMERICS
when an old pair's times change.
"""

NUMERICS = 3
"""Raised when what this benchmark counts or times changes, be it here or in the engine (harness/numerics.py)."""
