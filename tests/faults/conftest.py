"""One process that has imported everything, for all tests of this folder."""

import pytest

from tests.faults.harness import Zygote


@pytest.fixture(scope="session")
def zygote():
    found = Zygote()
    yield found
    found.close()
