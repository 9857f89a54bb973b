import pytest

from lowvram_db.memory.stream.lanes import Why


@pytest.fixture
def slow_lane() -> dict[Why, str]:
    """What has to be slow for a wait that is missing to be seen."""
    return {
        Why.ARRIVED: "up",
        Why.COMPUTED: "compute",
        Why.LEFT: "down",
        Why.READ: "compute",
        Why.RETURNED: "down",
        Why.FILLED: "fill",
        Why.SENT: "up",
        Why.LANDED: "down",
        Why.DRAINED: "drain",
        Why.AT_REST: "down",
    }
