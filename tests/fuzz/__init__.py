"""Random cases by the thousand, and the one thing that holds of all of them.

Either the numbers are those of `amos_dist.reference.amos_step` within the table of tolerances (tests/conftest.py), or
the call ends with a declared error: a TypeError, ValueError or RuntimeError of two sentences. After an error nothing
has changed, and the optimizer still steps as the reference does.

    pytest tests/fuzz                    "ci": the same cases in every run
    AMOS_FUZZ=long pytest tests/fuzz     "long": other cases in every run, and twenty times as many
    python tests/fuzz/long_run.py        one training run of 20,000 steps: memory, drift between ranks, the decay

* cases.py draws shapes, dtypes, keywords, gradients and damage from a `random.Random`: hypothesis gives one that it can
  shrink, and ranks that start from one seed draw the same.
* oracle.py keeps one reference state for each parameter beside an optimizer; outcome.py knows a declared error, and
  whether anything has changed.
* test_steps, test_sequences (stateful), test_settings and test_state_dicts run in one process, test_partitions on ranks
  that are threads, test_placements on real ones.
"""
