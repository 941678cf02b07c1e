"""What is loaded, and who is answered by it: a lock around a pure core.

`plan.py` decides with the rules of `policy.py` about the objects of `state.py`, and does nothing
else. `controller.py` holds the lock while it decides, and acts once the lock is released.
"""

from mlxproxy.controller.controller import Controller
from mlxproxy.controller.history import History
from mlxproxy.controller.lease import Claim, Lease
from mlxproxy.controller.state import Limits

__all__ = ["Claim", "Controller", "History", "Lease", "Limits"]
