from __future__ import annotations

import pytest

from tests.models.dynamic.hf.exports import Exported, export


@pytest.fixture(scope="module", params=["mod", "dtf"])
def exported(request, tmp_path_factory) -> Exported:
    return export(tmp_path_factory.mktemp(request.param), request.param)
