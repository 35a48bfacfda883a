import pickle

import pytest

from tulu_lightning.errors import InputError
from tulu_lightning.verifiers import registry


def test_an_unknown_name_is_refused_with_the_nearest_one():
    with pytest.raises(InputError, match=r"no verifier 'last_numer'.*Did you mean 'last_number'"):
        registry.get("last_numer")


def test_targets_are_checked_by_the_named_verifier():
    assert registry.check_target("last_number", "sixty") == "'sixty' is not a number"
    assert registry.check_target("exact", "sixty") is None
    with pytest.raises(InputError):
        registry.check_target("nothing", "1")


@pytest.mark.parametrize("name", registry.VERIFIERS)
def test_every_verifier_can_be_sent_to_another_process(name):
    copy = pickle.loads(pickle.dumps(registry.get(name)))
    assert type(copy) is type(registry.get(name))
    assert copy == registry.get(name)
