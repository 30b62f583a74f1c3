"""An example of Hypothesis may take as long as the machine, which others may keep busy, makes it take."""

from hypothesis import settings

settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
