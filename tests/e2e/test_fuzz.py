"""A short run of the fuzz: a random engine under random traffic (``make fuzz``)."""

import random
from contextlib import closing

import pytest
from fuzz import Fuzz

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("seed", [757])
def test_fuzz(reference_model, seed, no_engine):
    no_engine()
    fuzz = Fuzz(random.Random(seed), reference_model)
    with closing(fuzz.engine):
        fuzz.run(steps=60)
    assert fuzz.counts["compared"] > 3
    assert fuzz.counts["preemptions"] > 0
