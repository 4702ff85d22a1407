"""MessagePack-RPC over a Unix socket: a codec without I/O, a server and two clients. See docs/rpc.md.

The package knows nothing of what it carries: methods come as a table, each takes one map of fields.
"""

from .blocking import BlockingClient
from .budget import Account, Budget
from .client import Client
from .connection import Connection, InTurn, Method, Session
from .errors import Disconnected, Malformed, RpcError, SocketRefused
from .limits import Limits
from .messages import Notification
from .server import VERSION, Server
from .sockets import Peer

__all__ = [
    "VERSION",
    "Account",
    "BlockingClient",
    "Budget",
    "Client",
    "Connection",
    "Disconnected",
    "InTurn",
    "Limits",
    "Malformed",
    "Method",
    "Notification",
    "Peer",
    "RpcError",
    "Server",
    "Session",
    "SocketRefused",
]
