"""Views for notebooks: stock ipywidgets and one plotly figure each, over functions that a script can call alike.

Long work runs beside the kernel (see `tasks`); every view shows the call that it makes. They need the packages
ipywidgets and anywidget: ``pip install 'obc_tools[notebook]'``.
"""

from .explorers import InteractionExplorer, JTJExplorer
from .monitor import RunMonitor
from .studio import PruningStudio

__all__ = ["InteractionExplorer", "JTJExplorer", "PruningStudio", "RunMonitor"]
