"""Documents: ordered texts and pictures, what the model reads and writes."""
from .document import *  # noqa: F403
from .formats import *  # noqa: F403
from .pictures import *  # noqa: F403
