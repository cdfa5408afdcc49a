from .folder import Stopped

__all__ = ["Stopped"]
