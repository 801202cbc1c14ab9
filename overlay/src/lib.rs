//! The WireGuard mesh shared by edge and node.
