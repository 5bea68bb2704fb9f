"""All exhibits, by name."""

from __future__ import annotations

from tests.museum.data_and_export import DATA, EXPORT
from tests.museum.exhibit import Exhibit
from tests.museum.gradients import GRADIENTS
from tests.museum.optimizing import OPTIMIZING
from tests.museum.randomness import RANDOMNESS
from tests.museum.resuming import RESUMING

EXHIBITS: dict[str, Exhibit] = {
    **GRADIENTS,
    **RANDOMNESS,
    **OPTIMIZING,
    **RESUMING,
    **DATA,
    **EXPORT,
}
