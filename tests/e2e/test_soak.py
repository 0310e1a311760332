"""A short run of the soak: random traffic over a pool that is too small (``make soak``)."""

import random
from contextlib import closing

import pytest
from soak import Soak

pytestmark = pytest.mark.e2e

STEPS = 100


# With all separators kept, and with a bound on them.
def test_soak(reference_model, no_engine):
    no_engine()
    soak = Soak(random.Random(301), check_share=0.2, reference=reference_model)
    with closing(soak.engine):
        soak.run(lambda: soak.counts["steps"] < STEPS)
    assert soak.counts["compared"] > 3
    assert soak.counts["preemptions"] > 0
