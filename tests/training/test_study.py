from functools import partial
from multiprocessing import get_start_method

import pytest

from transformers_degmix.training.study import run_all


def test_several_trainings_at_a_time_are_in_order():
    assert run_all([partial(pow, 2, exponent) for exponent in range(5)], num_jobs=2) == [1, 2, 4, 8, 16]


def test_loaders_start_as_elsewhere():
    assert run_all([get_start_method], num_jobs=2) == [get_start_method()]


@pytest.mark.parametrize("num_jobs", [1, 2])
def test_an_error_of_a_training_is_raised(num_jobs):
    with pytest.raises(ValueError, match="'x'"):
        run_all([partial(int, "x"), partial(int, "1")], num_jobs)
