"""Loads, unloads and leases of the backends: a lock around a pure core.

`plan.py` applies the rules of `policy.py` to the objects of `state.py`, and does nothing else.
`controller.py` holds the lock while the core decides, and acts once it has released the lock.
"""

from mlxproxy.controller.controller import Controller
from mlxproxy.controller.history import History
from mlxproxy.controller.lease import Claim, Lease
from mlxproxy.controller.state import Limits

__all__ = ["Claim", "Controller", "History", "Lease", "Limits"]
