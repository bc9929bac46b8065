"""Property tests try the same examples each time, so that a failure is of the change at hand.

HYPOTHESIS_PROFILE=explore tries others.
"""

import os

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None, deadline=None)
settings.register_profile("explore", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))
