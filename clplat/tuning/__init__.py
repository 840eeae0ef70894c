"""`clplat tune`: searches a space of configurations, and reports on what the search has not seen.

The flow of one trial, in the process that searches (workers know nothing of a search):

    search.take()      trials.ask()  →  values of the space  →  a variant of study.yaml, run folders for its seeds
    launch.serve()     gives each folder to a worker: an ordinary run (journal, checkpoints, MLflow)
    search.boundary()  at each task's end: values so far  →  pruning  →  go on, or end there (PRUNED)
    search.ended()     the next seed, or: values of the whole trial  →  trials.complete()

    tune       from a configuration to the gain: checks, search, report; what `clplat resume` takes up again
    ├── protocol   what is tuned on (first tasks, development stream) and what is reported (full stream, fresh seeds)
    ├── search     the supply of runs that `launch.serve` asks
    │   ├── trials     the Optuna study: asking, telling, heartbeats, trials of workers that are gone
    │   └── pruning    whether a trial is worth going on with
    ├── gain       default against best in a study of their own; the paired difference
    └── outcome    front.csv, best.yaml, figures, tuning.html, MLflow's parent run
        └── front, figures, page
    checks     the configuration as far as nothing has to be built; options: the `tune:` block
    space      the keys that vary, checked against the configuration
"""
