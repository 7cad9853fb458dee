"""100,000 damaged checkpoints; `python tests/checkpoint/fuzz_headers.py 5000000` runs more."""

import fuzz_headers


def test_nothing_but_checkpoint_error_comes_out() -> None:
    outcomes = fuzz_headers.main(100_000)
    assert sum(outcomes.values()) == 100_000
    # The damage must neither be refused always nor pass always.
    assert 50_000 < outcomes["refused"] < 97_000
    assert outcomes["servable True"] > 100 and outcomes["servable False"] > 100
