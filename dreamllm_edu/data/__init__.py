"""The miniature's world (`world`, `tasks`), and published corpora (`records`, `readers`, `lanes`)."""
from .tasks import *  # noqa: F403
from .world import *  # noqa: F403
