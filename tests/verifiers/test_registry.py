import pickle
import subprocess
import sys

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


@pytest.mark.parametrize("name", ["math", "math_strict", "math_release", "ifeval", "ifeval_tulu"])
def test_warming_loads_what_a_call_needs(name):
    script = (
        "import sys; from tulu_lightning.verifiers import registry; verifier = registry.get(sys.argv[1]); "
        "heavy = ('sympy', 'math_verify', 'langdetect', 'nltk'); assert not any(m in sys.modules for m in heavy); "
        "verifier.warm(); print(*(m for m in heavy if m in sys.modules), 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", script, name], capture_output=True, text=True, check=True).stdout
    wanted = {"math_release": "sympy False", "ifeval": "langdetect nltk False", "ifeval_tulu": "langdetect nltk False"}
    assert said.strip() == wanted.get(name, "sympy math_verify False")
