"""One test for each system that the paper is listed with (a neighbour), so that nobody has to wonder.

A neighbour is one file of this package. It defines, as plain values that are read without importing it,

    NUMERICS    raised by a change of what it computes
    TITLE       how the table calls it
    PAPER       its arXiv id
    CLAIM       what its paper claims: one sentence with a number, as reported
    TESTED      what is tested here: one sentence
    MINUTES     about how long run() takes on 2 cores
    USES        other parts whose numbers it depends on: methods ("meft"), tasks ("facts"), "training", "evaluation",
                "probes", "bench", "profile", "simulator", "embedded" (the base that ships)

and, as code that imports torch only when it is called,

    run(quick)           measures or simulates; a dict that JSON can hold, with its "evidence" (the weakest of its
                         parts; "evidence_of" says that of each where they differ). quick: at the sizes of a test
    findings(found)      what came out, computed from that dict: a list of Finding (finding.py)

and, if it looks at training runs of the harness, specs(quick), a list of RunSpec. Those that are neither published
nor on this machine are made first, in results/runs as those of every suite, and run(quick, records) gets the records
in the same order. Files without NUMERICS hold what neighbours share. suite.py finds, plans, runs and writes;
report/tables/neighbours.py shows.
"""
