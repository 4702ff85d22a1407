"""The control plane: the engine's commands over MessagePack-RPC, a connection being one context."""
