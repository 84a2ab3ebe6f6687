from collections.abc import Iterator

import pytest

from tests.services import BrokerSite, make_broker_site


@pytest.fixture(scope="module")
def plant(tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerSite]:
    """A site with a running broker."""
    site = make_broker_site(tmp_path_factory.mktemp("site"))
    site.start()
    yield site
    site.stop()
